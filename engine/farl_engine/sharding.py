"""Weights, gradients and optimizer states shared out over the processes (FSDP2), and whole again where that is needed.

Matrices are shared out: each process keeps some rows of each and has all of a block's only while it computes that
block. What the caller keeps whole (vectors, scalars: next to nothing) every process has, and its gradients are averaged
in one call. Functions here take models and states that are not shared out as well, and then do what one would expect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from farl_engine.distributed import World


def shard(model: nn.Module, blocks: Sequence[nn.Module], *, keep: Callable[[str, Tensor], bool], world: World) -> None:
    """Share out `model`, built in full on the CPU of every process, and move it to `world.device`, part by part.

    Its parameters become DTensors of which a process holds some rows. Whatever belongs to none of `blocks` is gathered
    at the start of a forward pass and kept to the end of the backward pass.

    Args:
        blocks: modules of `model`, gathered one at a time. A block is called by its `forward`, once a pass.
        keep: for a parameter's name and value, whether every process keeps all of it. Their values are rank 0's.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    whole = {parameter for name, parameter in model.named_parameters() if keep(name, parameter)}
    for parameter in whole:
        parameter.data = parameter.data.to(world.device)
    _in_one_call([p.data for p in model.parameters() if p in whole], lambda flat: dist.broadcast(flat, src=0))
    for block in blocks:
        # Before FSDP's own hook, which would hang another hook on a parameter handed on as it is, at each call.
        block.register_forward_hook(_hand_on_copies)
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    if world.device.type == "cpu":
        # gloo has no averages; the division follows by itself.
        for module in _parts(model):
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    return bool(_parts(model))


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All weights on each process inside, so that each may call any method as often as it likes, without gradients.

    Entering is a collective call.
    """
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of those that every process keeps whole: FSDP has done so with the others."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]

    def average(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= dist.get_world_size()

    _in_one_call(gradients, average)


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` for parameters of which some are shared out.

    Args:
        largest: norm to clip to; 0 does not clip.

    Returns:
        The norm before clipping, 0-d and the same on every process: a plain tensor on the device.
    """
    largest = largest or float("inf")
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, largest, foreach=True)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = nn.utils.get_total_norm(shards, foreach=True).square()
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(whole, foreach=True).square()).sqrt() if whole else square.sqrt()
    torch._foreach_mul_(shards + whole, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gathered(state: Any) -> Any:
    """A copy of `state` (nested dicts and lists) with whole tensors on rank 0's CPU; other ranks get None for each.

    A collective call, tensor by tensor: no device ever holds more than one of them whole.
    """
    if isinstance(state, DTensor):
        return _gather(state)
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of whole tensors, of which each process takes its rows."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {name: _rows_like(parameters[index], value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": entries})


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _hand_on_copies(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map_only(nn.Parameter, lambda parameter: parameter.clone(), output)


def _in_one_call(tensors: list[Tensor], call: Callable[[Tensor], object]) -> None:
    """Let `call` change `tensors` as one flat tensor."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    call(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def _most_rows(x: DTensor) -> int:
    """What a process holds; the last ones may have fewer or none."""
    return -(-len(x) // x.device_mesh.size())


def _rows(x: DTensor) -> slice:
    """Those that this process holds."""
    most = _most_rows(x)
    first = x.device_mesh.get_local_rank() * most
    return slice(min(first, len(x)), min(first + most, len(x)))


@torch.no_grad()
def _gather(x: DTensor) -> Tensor | None:
    group, processes = x.device_mesh.get_group(), x.device_mesh.size()
    local, most = x.to_local(), _most_rows(x)
    # All must send as much.
    sent = local.new_zeros(most, *x.shape[1:])
    sent[: len(local)] = local
    main = dist.get_rank(group) == 0
    parts = [torch.empty_like(sent) for _ in range(processes)] if main else None
    dist.gather(sent, parts, dst=0, group=group)
    if parts is None:
        return None
    found = torch.empty(x.shape, dtype=x.dtype)
    for rows, part in zip(found.split(most), parts, strict=False):
        rows.copy_(part[: len(rows)])
    return found


def _rows_like(parameter: Tensor, value: Any) -> Any:
    """This process's rows of `value` if `parameter` is shared out and of its shape, else `value` itself."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    local = value[_rows(parameter)].to(parameter.device, copy=True)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=value.shape,
        stride=value.contiguous().stride(),
    )
