"""What the ranks of a contrastive loss send each other: features, column statistics, text gradients.

Features travel in the dtype of the computation and are not rounded on the way. Text gradients travel in the features'
dtype (float16 features: in float32), so that a rank's share is rounded to bfloat16 where the features are; NCCL adds
the shares in that dtype, on the CPU they are added in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farl_kernels.contrastive.options import OP

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Ranks:
    """The ranks that share a loss, and their collectives. `group` None: the default group, or one process."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        initialised = dist.is_available() and dist.is_initialized()
        if group is not None and not initialised:
            raise ValueError(f"{OP}: group is given, want torch.distributed initialised first (init_process_group)")
        self.group = group
        self.rank = dist.get_rank(group) if initialised else 0
        self.world_size = dist.get_world_size(group) if initialised else 1
        if self.rank < 0:
            raise ValueError(f"{OP}: group does not hold this rank, want calls on the group's own ranks only")

    @classmethod
    def alone(cls) -> Ranks:
        """This process by itself, whatever groups there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.world_size = None, 0, 1
        return ranks

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """[n, ...] -> ([W * n, ...] by rank, the work to wait for)."""
        if self.world_size == 1:
            return x, None
        x = x.contiguous()
        gathered = x.new_empty((self.world_size * x.shape[0], *x.shape[1:]))
        work = dist.all_gather_into_tensor(_bytes(gathered), _bytes(x), group=self.group, async_op=True)
        return gathered, work

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [W * n, ...], by rank."""
        gathered, work = self.start_all_gather(x)
        if work is not None:
            work.wait()
        return gathered

    def all_to_all(self, x: Tensor) -> Tensor:
        """[W, ...] -> [W, ...]: slice r goes to rank r, which finds the sender's at the sender's rank."""
        if self.world_size == 1:
            return x
        received = torch.empty_like(x)
        dist.all_to_all_single(_bytes(received), _bytes(x), group=self.group)
        return received

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, added in rank order so that every rank has the same bits."""
        return x if self.world_size == 1 else self.all_gather(x[None]).sum(0)

    def start_reduce_scatter(self, x: Tensor, accumulate: torch.dtype) -> Callable[[], Tensor]:
        """[W * n, D], this rank's share of everybody's rows -> a function that waits for the sum [n, D] of its rows."""
        if self.world_size == 1:
            return lambda: x.to(accumulate)
        if x.is_cuda:
            scattered = x.new_empty((x.shape[0] // self.world_size, *x.shape[1:]))
            work = _started(dist.reduce_scatter_tensor(scattered, x, group=self.group, async_op=True))

            def wait() -> Tensor:
                work.wait()
                return scattered.to(accumulate)

            return wait
        # The same bytes as a reduce-scatter on gloo, with a sum in rank order and full precision.
        received = torch.empty_like(x)
        work = _started(dist.all_to_all_single(_bytes(received), _bytes(x), group=self.group, async_op=True))

        def wait_and_add() -> Tensor:
            work.wait()
            parts = received.view(self.world_size, -1, *x.shape[1:])
            total = parts[0].to(accumulate, copy=True)
            for part in parts[1:]:
                total += part
            return total

        return wait_and_add

    def check_equal(self, features: Tensor) -> None:
        """Raise ValueError on every rank unless all of them hold as many features of one dtype.

        A few bytes are gathered every time, because the gather of unequal features would hang. They are read at once
        on the CPU; on a GPU only where the shape is new to this process, so that later steps do not wait: there, a
        difference that arises later is an error on the ranks whose shape is new, and the others wait for them.
        """
        if self.world_size == 1:
            return
        mine = (*features.shape, _DTYPES.index(features.dtype))
        # Filled on the device: a tensor made of a list would be copied there, and the host would wait for the copy.
        told = [torch.full((1, 1), number, dtype=torch.int64, device=features.device) for number in mine]
        every = self.all_gather(torch.cat(told, dim=1))
        if features.is_cuda:
            seen = (self.group, mine)
            if seen in _seen_shapes or torch.cuda.is_current_stream_capturing():
                return
            _seen_shapes.add(seen)
        shapes = every.tolist()
        if any(shape != shapes[0] for shape in shapes):
            listed = ", ".join(f"rank {r}: [{n}, {d}] {_DTYPES[t]}" for r, (n, d, t) in enumerate(shapes))
            raise ValueError(f"{OP}: text_features differs between ranks ({listed}), want one shape and dtype")


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # async_op=True on a member of the group
    return work


_seen_shapes: set[tuple[Any, ...]] = set()


def _bytes(x: Tensor) -> Tensor:
    # gloo has not always known bfloat16; a copy needs no arithmetic. Never seen by a sum.
    return x.view(torch.uint8) if not x.is_cuda and x.element_size() == 2 else x


class ReturningGradient:
    """The gradient of the local features on its way back from the other ranks.

    The loss's backward starts the reduce-scatter and hands autograd a stand-in of zeros; the backward of the gather
    recognises the stand-in and waits for the sum. Made before the image tower runs, the gather's node runs after the
    image tower's backward, so the exchange hides behind that.
    """

    def __init__(self) -> None:
        self.losses = 0
        self._stand_in: Tensor | None = None
        self._finish: Callable[[], Tensor] | None = None

    def send(self, finish: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Gradient to return to autograd now for the features `like`; `finish` waits for the real one."""
        if self.losses != 1:  # autograd would add the stand-ins of several losses
            return finish()
        self._finish = finish
        self._stand_in = like.new_zeros(()).expand(like.shape)
        return self._stand_in

    def receive(self, grad: Tensor) -> Tensor:
        """The real gradient for what autograd brought to the gather."""
        stand_in, finish = self._stand_in, self._finish
        self._stand_in = self._finish = None
        if stand_in is None or finish is None or stand_in.data_ptr() != grad.data_ptr():
            return grad
        return finish()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, returning: ReturningGradient) -> Tensor:
        ctx.returning = returning
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.returning.receive(grads[0]), None


class GatheredFeatures:
    """Text features of all ranks, on their way: the handle that :func:`gather_features` returns.

    `shape` is that of the local features, `dtype` the one in which the loss is computed.
    """

    def __init__(self, features: Tensor, ranks: Ranks) -> None:
        self.ranks = ranks
        self.returning = ReturningGradient()  # apart from the handle: no cycle keeps the buffers alive
        # With several ranks `local` is for the loss alone: its gradient may be the stand-in.
        self.local = _Gather.apply(features, self.returning) if ranks.world_size > 1 else features
        ranks.check_equal(features)
        self._all, self._work = ranks.start_all_gather(features.detach())

    @property
    def shape(self) -> torch.Size:
        return self.local.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    def wait(self) -> Tensor:
        """The features of all ranks [W * n, D] in rank order, without gradient."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._all
