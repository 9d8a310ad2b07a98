"""Benchmarks against peers, the command that runs them on a GPU, and the report that draws them."""
