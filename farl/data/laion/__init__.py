"""LAION-Face, step by step: ids -> parquet -> img2dataset -> filters -> face boxes -> dataset card."""
