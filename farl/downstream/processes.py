"""What the processes of a run have to agree on within a training step."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of every process's `value`, of any shape, without a gradient; `value` itself in a run of one process.

    All processes call it the same number of times. A loss that is divided by such a mean, in the place of the process's
    own count, averages to that of the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
