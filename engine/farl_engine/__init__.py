"""The training engine: data, loop, checkpoints, metrics. It knows nothing of faces and nothing of kernels.

Importing this package does not import torch: a run installs its signal handlers (`farl_engine.stop`) first.
"""
