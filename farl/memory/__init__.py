"""Memory of a training step before anything runs, and the largest batch that fits.

python -m farl.memory farl-b16 --gpu-memory 80 --world-size 8 --global-batch 5120
"""

from farl.memory.prediction import Memory, predict_memory
from farl.memory.setting import (
    GB,
    MARGIN,
    Setting,
    choose_micro_batch,
    choose_setting,
    fits,
    largest_batch,
    memory_warning,
)

__all__ = [
    "GB",
    "MARGIN",
    "Memory",
    "Setting",
    "choose_micro_batch",
    "choose_setting",
    "fits",
    "largest_batch",
    "memory_warning",
    "predict_memory",
]
