"""The ahead-of-time gate: what every kernel compiles to, for every table entry and architecture, without a GPU.

``python -m farl_kernels.aot`` prints it; ``--check`` also holds it to the budgets in `budgets/` and fails on a
regression; ``--update`` writes them anew.
"""
