"""Self-attention over packed sequences of any lengths, in Triton."""
