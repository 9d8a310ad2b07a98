"""Fine-tuning on face tasks: parsing, alignment, attributes."""
