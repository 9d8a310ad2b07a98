"""Run by ``test_world_sizes.py`` as one process a rank: checks of the loss that need several ranks.

    ranks.py RANK WORLD_SIZE FOLDER

Rank 0 writes FOLDER/results.json: what went wrong with each check, "" where nothing did. Each check builds the same
global batch on every rank, works on its slice, and compares with the N x N definition on the whole batch.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import dense
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from farl_kernels.contrastive import ClipLoss, GatheredFeatures, SigLipLoss, contrastive_loss, gather_features

GLOBAL, FEATURES, DIM = 72, 10, 8  # 72 pairs: 1, 2, 3, 4 and 8 ranks divide them
CHECKS: dict[str, Callable[[int, int], None]] = {}


def check(fn: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CHECKS[fn.__name__] = fn
    return fn


class Towers(nn.Module):
    """Linear towers in float64 that start the exchange between each other, as a trainer does."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.image = nn.Parameter(torch.randn(FEATURES, DIM, generator=g, dtype=torch.float64))
        self.text = nn.Parameter(self.image.detach() + torch.randn(FEATURES, DIM, generator=g, dtype=torch.float64))
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor, start: Callable[[Tensor], Any]) -> tuple[Tensor, Any, Tensor, Tensor]:
        text = start(F.normalize(y @ self.text, dim=1))
        return F.normalize(x @ self.image, dim=1), text, self.logit_scale.exp(), self.logit_bias


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(GLOBAL, FEATURES, generator=g, dtype=torch.float64)
    y = x + 0.5 * torch.randn(GLOBAL, FEATURES, generator=g, dtype=torch.float64)
    return x, y, torch.randint(0, GLOBAL // 2, (GLOBAL,), generator=g)


def truth(rows: slice = slice(None), **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair of the global batch (or of `rows` alone) and parameter gradients of their mean."""
    x, y, ids = batch()
    model = Towers()
    image, text, scale, bias = model(x[rows], y[rows], lambda features: features)
    if settings.get("kind") == "sigmoid":
        settings["logit_bias"] = bias
    if "duplicates" in settings:
        settings["ids"] = ids[rows]
    losses = dense.dense_loss(image, text, scale, **settings)
    losses.mean().backward()
    return losses.detach(), {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}


Scheme = Callable[[Tensor, Any, Tensor, Tensor, Tensor], Tensor]


def trained(
    rank: int,
    world: int,
    scheme: Scheme,
    *,
    start: Callable[[Tensor], Any] = lambda features: features,
    group: dist.ProcessGroup | None = None,
    rows: slice | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's loss and the parameter gradients that DDP leaves when `scheme` makes the loss."""
    x, y, ids = batch()
    n = GLOBAL // world
    rows = rows or slice(rank * n, rank * n + n)
    model = DistributedDataParallel(Towers(), process_group=group)
    loss = scheme(*model(x[rows], y[rows], start), ids[rows])
    (loss + sum(0 * p.sum() for p in model.module.parameters())).backward()  # DDP wants every parameter used
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.module.named_parameters()}
    return loss.detach(), grads


def ours(**settings: Any) -> Scheme:
    def scheme(image: Tensor, text: Any, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        if settings.get("kind") == "sigmoid":
            settings["logit_bias"] = bias
        if "duplicates" in settings:
            settings["ids"] = ids
        loss = contrastive_loss(image, text, scale, chunk_bytes=8 * 100, **settings)
        assert isinstance(loss, Tensor)
        return loss

    return scheme


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Names of the parameters whose gradients differ, with the ratio of the norms."""
    return [
        f"{k} x{(got[k].norm() / want[k].norm()).item():.4f}"
        for k in want
        if not torch.allclose(got[k], want[k], rtol=1e-9, atol=1e-12)
    ]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"duplicates": "mask", "label_smoothing": 0.1},
    {"duplicates": "multi_positive"},
    {"duplicates": "multi_positive", "label_smoothing": 0.1},
    {"kind": "sigmoid"},
    {"kind": "sigmoid", "duplicates": "mask"},
    {"kind": "sigmoid", "duplicates": "multi_positive"},
]


def _equals_one_process(rank: int, world: int, **how: Any) -> None:
    n = GLOBAL // world
    for settings in SETTINGS:
        losses, want = truth(**settings)
        loss, got = trained(rank, world, ours(**settings, **how))
        assert torch.allclose(loss, losses[rank * n : rank * n + n].mean(), rtol=1e-11), (settings, loss)
        assert not differences(got, want), (settings, differences(got, want))


@check
def parameters_after_ddp(rank: int, world: int) -> None:
    _equals_one_process(rank, world)


@check
def parameters_after_ddp_deterministic(rank: int, world: int) -> None:
    _equals_one_process(rank, world, deterministic=True)


@check
def parameters_after_fsdp(rank: int, world: int) -> None:
    _, want = truth()
    x, y, ids = batch()
    rows = slice(rank * (GLOBAL // world), (rank + 1) * (GLOBAL // world))
    model = Towers()
    # FSDP shards no scalars: a trainer averages their gradients itself.
    scalars = {model.logit_scale, model.logit_bias}
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=scalars)
    ours()(*model(x[rows], y[rows], gather_features), ids[rows]).backward()
    assert model.logit_scale.grad is not None
    dist.all_reduce(model.logit_scale.grad)
    got = {"logit_scale": model.logit_scale.grad / world, "logit_bias": want["logit_bias"]}
    got |= {name: getattr(model, name).grad.full_tensor() for name in ("image", "text")}
    assert not differences(got, want), differences(got, want)


@check
def early_gather(rank: int, world: int) -> None:
    """The handle is made before the image tower; its gradient arrives once, also when two losses use it."""
    _, want = truth()
    handles: list[GatheredFeatures] = []

    def start(features: Tensor) -> GatheredFeatures:
        handles.append(gather_features(features))
        return handles[-1]

    _, got = trained(rank, world, ours(), start=start)
    assert not differences(got, want), differences(got, want)
    assert handles[0].wait().shape == (GLOBAL, DIM)

    def twice(image: Tensor, text: Any, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        return 0.25 * ours()(image, text, scale, bias, ids) + 0.75 * ours()(image, text, scale, bias, ids)

    _, got = trained(rank, world, twice, start=start)
    assert not differences(got, want), differences(got, want)


@check
def repeated_and_partial_backward(rank: int, world: int) -> None:
    """A stand-in left by a backward that never reached the gather does not leak into the next one."""
    image, text = dense.pairs(GLOBAL, DIM)
    n = GLOBAL // world
    image, text = (x[rank * n : rank * n + n].clone().requires_grad_() for x in (image, text))
    scale = torch.tensor(9.0)
    loss = contrastive_loss(image, text, scale)
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss, (image, text), retain_graph=True)
    torch.autograd.grad(loss, image, retain_graph=True)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    for x, g in zip((image, text), first, strict=True):
        assert g.any() and torch.allclose(x.grad, 3 * g, rtol=1e-12)
    handle = gather_features(text)
    loss = contrastive_loss(image, handle, scale)
    assert isinstance(loss, Tensor)
    torch.autograd.grad(loss, image)
    loss = contrastive_loss(image, handle, scale)
    assert isinstance(loss, Tensor)
    (got,) = torch.autograd.grad(5 * loss, text)
    assert torch.allclose(got, 5 * first[1], rtol=1e-12)


@check
def weights_of_pairs_on_other_ranks(rank: int, world: int) -> None:
    weights = torch.linspace(-1, 3, GLOBAL, dtype=torch.float64)
    n = GLOBAL // world
    for settings in ({}, {"kind": "sigmoid"}, {"label_smoothing": 0.2, "duplicates": "multi_positive"}):
        _, _, ids = batch()
        extra = {"ids": ids} if "duplicates" in settings else {}
        image, text = (x.requires_grad_() for x in dense.pairs(GLOBAL, DIM))
        scale = torch.tensor(9.0, dtype=torch.float64)
        want = torch.autograd.grad(
            (weights * dense.dense_loss(image, text, scale, **settings, **extra)).sum(), (image, text)
        )
        here = slice(rank * n, rank * n + n)
        extra = {k: v[here] for k, v in extra.items()}
        for deterministic in (False, True):
            local = [x.detach()[here].clone().requires_grad_() for x in (image, text)]
            rows = contrastive_loss(*local, scale, reduction="none", deterministic=deterministic, **settings, **extra)
            assert isinstance(rows, Tensor)
            got = torch.autograd.grad((weights[here] * rows).sum(), local)
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b[here], rtol=1e-9, atol=1e-12), (settings, deterministic)


@check
def frozen_sides(rank: int, world: int) -> None:
    _, want = truth()
    for frozen in ("image", "text", "logit_scale"):

        def scheme(image: Tensor, text: Any, scale: Tensor, bias: Tensor, ids: Tensor, frozen: str = frozen) -> Tensor:
            sides = {"image": image, "text": text, "logit_scale": scale}
            sides[frozen] = sides[frozen].detach()
            loss = contrastive_loss(*sides.values())
            assert isinstance(loss, Tensor)
            return loss

        _, got = trained(rank, world, scheme)
        assert not got[frozen].any()
        rest = {k: v for k, v in want.items() if k not in (frozen, "logit_bias")}
        assert not differences({k: got[k] for k in rest}, rest), (frozen, differences(got, want))


@check
def metrics(rank: int, world: int) -> None:
    image, text = dense.pairs(GLOBAL, DIM, noise=0.8)
    n = GLOBAL // world
    here = slice(rank * n, rank * n + n)
    labels = torch.arange(GLOBAL)
    correct = [((image @ text.T).argmax(d) == labels).float()[here].mean() for d in (1, 0)]
    for how in ({}, {"deterministic": True}, {"kind": "sigmoid"}):
        _, got = contrastive_loss(image[here], text[here], torch.tensor(9.0), return_metrics=True, **how)
        assert [got["image_to_text_accuracy"], got["text_to_image_accuracy"]] == correct, how


@check
def nothing_is_rounded_on_the_way(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        fine = (1 + torch.finfo(dtype).eps * torch.arange(1, 7 * GLOBAL + 1).view(GLOBAL, 7) % 64).to(dtype)
        n = GLOBAL // world
        assert gather_features(fine[rank * n : rank * n + n]).wait().equal(fine)


@check
def sixteen_bits(rank: int, world: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        image, text = (x.to(dtype) for x in dense.pairs(GLOBAL, DIM))
        exact = [x.double().requires_grad_() for x in (image, text)]
        want = torch.autograd.grad(dense.dense_loss(*exact, torch.tensor(9.0)).sum(), exact)
        n = GLOBAL // world
        here = slice(rank * n, rank * n + n)
        local = [x[here].clone().requires_grad_() for x in (image, text)]
        loss = contrastive_loss(*local, torch.tensor(9.0), reduction="sum")
        assert isinstance(loss, Tensor)
        for a, b in zip(torch.autograd.grad(loss, local), want, strict=True):
            assert (a.double() - b[here]).norm() / b[here].norm() < 8e-3


@check
def subgroups(rank: int, world: int) -> None:
    """Each half of the ranks is a world of its own, with its own half of the batch, in reverse order of ranks."""
    half = world // 2
    members = [list(range(half)), list(range(half, world))] if half else [[0]]
    groups = [dist.new_group(m, timeout=timedelta(seconds=60)) for m in members]
    mine = 0 if rank < half or not half else 1
    group, size = groups[mine], len(members[mine])
    share = slice(0, 12) if mine == 0 else slice(12, 36)
    place = dist.get_rank(group)
    n = (share.stop - share.start) // size
    rows = slice(share.start + place * n, share.start + place * n + n)
    losses, want = truth(share)
    loss, got = trained(rank, world, ours(group=group), group=group, rows=rows)
    assert torch.allclose(loss, losses[place * n : place * n + n].mean(), rtol=1e-11)
    assert not differences(got, want), differences(got, want)
    if half:
        other = groups[1 - mine]
        with_error = ""
        try:
            contrastive_loss(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(1.0), group=other)
        except ValueError as error:
            with_error = str(error)
        assert "group does not hold this rank" in with_error, with_error


@check
def unequal_batches_are_refused_everywhere(rank: int, world: int) -> None:
    n = 5 if rank == world - 1 else 4
    try:
        contrastive_loss(torch.ones(n, 3), torch.ones(n, 3), torch.tensor(1.0))
    except ValueError as error:
        assert world > 1 and f"rank {world - 1}: [5, 3] torch.float32" in str(error), error
    else:
        assert world == 1


@check
def wrong_scales_are_seen(rank: int, world: int) -> None:
    """The comparison of these checks finds the slips by W and 1/W that other codebases have had."""
    _, want = truth()
    n = GLOBAL // world

    def everybody(x: Tensor, live: bool) -> Tensor:
        if live:
            return torch.cat(tuple(dist_nn.all_gather(x)))
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[rank] = x
        return torch.cat(parts)

    def cross_entropy(image: Tensor, text: Tensor, scale: Tensor, live: bool, local: bool) -> Tensor:
        images, texts = everybody(image, live), everybody(text, live)
        if not local:
            return dense.dense_loss(images, texts, scale).mean()
        labels = torch.arange(rank * n, rank * n + n)
        return 0.5 * (
            F.cross_entropy(scale * image @ texts.T, labels) + F.cross_entropy(scale * text @ images.T, labels)
        )

    def with_loss(live: bool, local: bool) -> dict[str, Tensor]:
        return trained(rank, world, lambda i, t, s, b, ids: cross_entropy(i, t, s, live, local))[1]

    right = with_loss(live=True, local=True)  # open_clip's local_loss + gather_with_grad
    assert not differences(right, want), differences(right, want)
    own_slice = with_loss(live=False, local=False)
    no_gather_gradient = with_loss(live=False, local=True)
    summed_scale = dict(right, logit_scale=right["logit_scale"] * world)
    if world == 1:
        return
    share = f"x{1 / world:.4f}"
    assert differences(own_slice, want) == [f"image {share}", f"text {share}"], differences(own_slice, want)
    assert [d.split()[0] for d in differences(no_gather_gradient, want)] == ["image", "text"]
    assert differences(summed_scale, want) == [f"logit_scale x{world:.4f}"]


@check
def deterministic_mode_does_not_see_the_ranks(rank: int, world: int) -> None:
    """To the bit: losses and features' gradients of 312 pairs, which do not fill whole blocks, as in a world of one."""
    alone = [dist.new_group([r], timeout=timedelta(seconds=60)) for r in range(world)][rank]
    count = 312
    n = count // world
    here = slice(rank * n, rank * n + n)
    ids = torch.arange(count) // 3

    def run(rows: slice, group: dist.ProcessGroup | None, dtype: torch.dtype, **settings: Any) -> list[Tensor]:
        local = [x[rows].to(dtype).requires_grad_() for x in dense.pairs(count, 64)]
        settings |= {"ids": ids[rows]} if "duplicates" in settings else {}
        settings |= {"group": group, "deterministic": True, "chunk_bytes": 128 * 4 * 70}
        losses = contrastive_loss(*local, torch.tensor(30.0), reduction="none", **settings)
        assert isinstance(losses, Tensor)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), local)]

    for dtype in (torch.float32, torch.bfloat16):
        for settings in ({}, {"label_smoothing": 0.1}, {"duplicates": "multi_positive"}, {"kind": "sigmoid"}):
            several = run(here, None, dtype, **settings)
            one = run(slice(None), alone, dtype, **settings)
            equal = [a.equal(b[here]) for a, b in zip(several, one, strict=True)]
            assert all(equal), (dtype, settings, equal)


KERNEL_SETTINGS: list[dict[str, Any]] = [
    {"return_metrics": True},
    {"duplicates": "mask", "label_smoothing": 0.1},
    {"duplicates": "multi_positive", "deterministic": True},
    {"kind": "sigmoid"},
]


@check
def kernels_over_ranks(rank: int, world: int) -> None:
    """Interpreted Triton kernels (float32) with the exchange: as the plain version, gradients of all inputs."""
    n = GLOBAL // world
    here = slice(rank * n, rank * n + n)
    _, _, ids = batch()

    def run(backend: str, settings: dict[str, Any]) -> list[Tensor]:
        local = [x[here].float().requires_grad_() for x in dense.pairs(GLOBAL, DIM)]
        scale = torch.tensor(20.0, requires_grad=True)
        extra = {"ids": ids[here]} if "duplicates" in settings else {}
        found = contrastive_loss(*local, scale, backend=backend, **settings, **extra)
        loss, metrics = found if isinstance(found, tuple) else (found, {})
        return [loss.detach(), *torch.autograd.grad(loss, [*local, scale]), *metrics.values()]

    for settings in KERNEL_SETTINGS:
        got, want = (run(name, settings) for name in ("triton", "reference"))
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=2e-5, atol=2e-6 * b.abs().max().item()), settings


@check
def deterministic_kernels_do_not_see_the_ranks(rank: int, world: int) -> None:
    alone = [dist.new_group([r], timeout=timedelta(seconds=60)) for r in range(world)][rank]
    n = GLOBAL // world
    here = slice(rank * n, rank * n + n)

    def run(rows: slice, group: dist.ProcessGroup | None, **settings: Any) -> list[Tensor]:
        local = [x[rows].to(torch.float16).requires_grad_() for x in dense.pairs(GLOBAL, 40)]
        losses, found = contrastive_loss(
            *local, torch.tensor(30.0), reduction="none", group=group, deterministic=True, backend="triton",
            return_lse=True, **settings,
        )  # fmt: skip
        return [losses.detach(), *found.values(), *torch.autograd.grad(losses.sum(), local)]

    for settings in ({}, {"label_smoothing": 0.1}):
        several, one = run(here, None, **settings), run(slice(None), alone, **settings)
        assert all(a.equal(b[here]) for a, b in zip(several, one, strict=True)), settings


@check
def drop_ins_after_ddp(rank: int, world: int) -> None:
    for settings in ({}, {"kind": "sigmoid"}):
        losses, want = truth(**settings)
        n = GLOBAL // world
        for local_loss in (False, True):
            place = {"rank": rank, "world_size": world}
            module = SigLipLoss(**place) if settings else ClipLoss(local_loss, gather_with_grad=True, **place)

            def scheme(
                image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor, module: nn.Module = module
            ) -> Tensor:
                return module(image, text, scale, bias, output_dict=True)["contrastive_loss"]

            loss, got = trained(rank, world, scheme)
            mean = losses[rank * n : rank * n + n].mean() if settings or local_loss else losses.mean()
            assert torch.allclose(loss, mean, rtol=1e-11), (settings, local_loss)
            assert not differences(got, want), (settings, local_loss, differences(got, want))
    pairs = dense.pairs(5, 4, seed=rank)
    alone = ClipLoss()(*pairs, torch.tensor(9.0))  # a world_size of 1: nobody else is asked
    assert torch.allclose(alone, dense.dense_loss(*pairs, torch.tensor(9.0)).mean())
    try:
        ClipLoss(gather_with_grad=True, rank=0, world_size=world + 1)(*pairs, torch.tensor(9.0))
    except ValueError as error:
        assert f"want rank {rank} of {world}" in str(error), error
    else:
        raise AssertionError("a wrong world size was taken")


@check
def gradient_caching_after_ddp(rank: int, world: int) -> None:
    """Two passes over micro-batches (Gao et al. 2021): features without a graph, loss, features again, its gradient."""
    _, want = truth()
    x, y, _ = batch()
    n = GLOBAL // world
    x, y = (v[rank * n : rank * n + n] for v in (x, y))
    model = DistributedDataParallel(Towers())
    parts = torch.arange(n).split(max(1, n // 3))
    with torch.no_grad():
        outputs = [model(x[part], y[part], lambda features: features) for part in parts]
    image, text = (torch.cat(v).requires_grad_() for v in list(zip(*outputs, strict=True))[:2])
    scale = outputs[0][2].detach().requires_grad_()
    loss = contrastive_loss(image, text, scale)
    assert isinstance(loss, Tensor)
    loss.backward()
    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            again, again_text, again_scale, bias = model(x[part], y[part], lambda features: features)
            carried = (again * image.grad[part]).sum() + (again_text * text.grad[part]).sum()
            (carried + again_scale * (scale.grad if last else 0.0) + 0 * bias).backward()
    got = {k: p.grad for k, p in model.module.named_parameters()}
    want = {k: v for k, v in want.items() if k != "logit_bias"}
    assert not differences({k: got[k] for k in want}, want), differences({k: got[k] for k in want}, want)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", where, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {}
    for name, fn in CHECKS.items():
        error = ""
        try:
            fn(rank, world)
        except Exception:
            error = f"rank {rank}: {traceback.format_exc()}"
        errors: list[Any] = [None] * world
        dist.all_gather_object(errors, error)
        results[name] = "\n".join(e for e in errors if e)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
