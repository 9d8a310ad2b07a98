"""Attention of one query a sequence, in Triton."""
