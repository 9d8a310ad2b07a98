"""The Triton kernels: every variant against the N x N definition in float64, tails, both exponential paths, bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from farl_kernels import tables
from farl_kernels.contrastive import contrastive_loss, custom_ops
from farl_kernels.contrastive.options import Options
from farl_kernels.launch import Launch, recorded_launches

VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "metrics": {"return_metrics": True},
    "smoothing": {"label_smoothing": 0.1},
    "mask": {"duplicates": "mask", "return_metrics": True},
    "mask smoothing": {"duplicates": "mask", "label_smoothing": 0.2},
    "multi": {"duplicates": "multi_positive", "return_metrics": True},
    "multi smoothing": {"duplicates": "multi_positive", "label_smoothing": 0.2},
    "sigmoid": {"kind": "sigmoid"},
    "sigmoid metrics": {"kind": "sigmoid", "return_metrics": True},
    "sigmoid mask": {"kind": "sigmoid", "duplicates": "mask"},
    "sigmoid multi": {"kind": "sigmoid", "duplicates": "multi_positive", "return_metrics": True},
}
CheckError = Callable[..., None]


@contextmanager
def small_blocks(m: int = 64, n: int = 16, k: int = 32) -> Iterator[None]:
    """Blocks so narrow that a few pairs make many tiles and several column chunks."""
    config = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": 4, "num_stages": 2}
    with ExitStack() as stack:
        for bucket in ("half", "half_more", "half_small", "ieee", "tf32", "tf32_more"):
            for kernel in ("statistics", "strip"):
                stack.enter_context(tables.override("contrastive", kernel, bucket, config | {"GROUP": 2}))
            stack.enter_context(tables.override("contrastive", "product", bucket, config))
        yield


def arguments(variant: str, count: int, device: torch.device) -> tuple[dict[str, Any], Tensor | None]:
    settings = dict(VARIANTS[variant])
    if "duplicates" in settings:
        g = torch.Generator().manual_seed(5)
        settings["ids"] = torch.randint(0, max(2, count // 2), (count,), generator=g).to(device)
    bias = torch.tensor(-2.0, device=device, requires_grad=True) if settings.get("kind") else None
    return settings, bias


def run(inputs: list[Tensor], weights: Tensor, **settings: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Per-pair losses and the gradients of their weighted sum."""
    found = contrastive_loss(
        *inputs[:3], logit_bias=inputs[3] if len(inputs) > 3 else None, reduction="none", **settings
    )
    losses, metrics = found if isinstance(found, tuple) else (found, {})
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), inputs)], metrics


def check_against_definition(
    dense: ModuleType,
    check_error: CheckError,
    image: Tensor,
    text: Tensor,
    scale: float,
    variant: str,
    **how: Any,
) -> None:
    """Kernels no further from float64 than twice (gradients: three times) the plain version in the same dtype."""
    device, count = image.device, len(image)
    settings, bias = arguments(variant, count, device)
    inputs = [image.detach().requires_grad_(), text.detach().requires_grad_()]
    inputs += [torch.tensor(scale, device=device, requires_grad=True), *([] if bias is None else [bias])]
    weights = torch.linspace(-0.5, 2.0, count, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = {k: v for k, v in settings.items() if k != "return_metrics"}
    losses = dense.dense_loss(*(x.cpu() for x in exact[:3]), logit_bias=exact[3].cpu() if bias is not None else None,
                              **{k: v.cpu() if isinstance(v, Tensor) else v for k, v in plain.items()})  # fmt: skip
    truth = [losses.detach(), *torch.autograd.grad((losses * weights.double().cpu()).sum(), exact)]
    same, wanted = run(inputs, weights, backend="reference", **settings, **how)
    got, metrics = run(inputs, weights, backend="triton", **settings, **how)
    names = ["loss", "d_image", "d_text", "d_scale", "d_bias"]
    for k, (a, b, c) in enumerate(zip(got, same, truth, strict=False)):
        if k in (3, 4):  # one number: how close plain PyTorch happens to come is luck, so its terms' size counts
            torch.testing.assert_close(a.double().cpu(), c.cpu(), rtol=2e-5, atol=1e-5 * count / scale)
        else:
            check_error(a.cpu(), b.cpu(), c.cpu(), factor=2 if k == 0 else 3, name=f"{variant} {names[k]}")
    assert metrics == wanted


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(
    dense: ModuleType, check_error: CheckError, device: torch.device, kernel_dtype: torch.dtype, variant: str
) -> None:
    image, text = (x.to(device, kernel_dtype) for x in dense.pairs(70, 40))
    check_against_definition(dense, check_error, image, text, 14.29, variant)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("variant", "deterministic"),
    [
        ("metrics", False),
        ("multi", False),
        ("mask smoothing", True),
        pytest.param("sigmoid multi", True, marks=pytest.mark.slow),
        pytest.param("multi", True, marks=pytest.mark.slow),
    ],
)
def test_chunks(
    dense: ModuleType,
    check_error: CheckError,
    device: torch.device,
    kernel_dtype: torch.dtype,
    variant: str,
    deterministic: bool,
) -> None:
    """150 columns in chunks of 128, forward and backward."""
    image, text = (x.to(device, kernel_dtype) for x in dense.pairs(150, 20))
    with small_blocks():
        check_against_definition(
            dense, check_error, image, text, 30.0, variant, chunk_bytes=1, deterministic=deterministic
        )


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [4, 16, 64, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 127, 128, 129, 300])
@pytest.mark.parametrize("variant", ["metrics", "multi smoothing", "sigmoid mask"])
def test_shapes(
    dense: ModuleType,
    check_error: CheckError,
    device: torch.device,
    kernel_dtype: torch.dtype,
    variant: str,
    count: int,
    dim: int,
) -> None:
    image, text = (x.to(device, kernel_dtype) for x in dense.pairs(count, dim))
    check_against_definition(dense, check_error, image, text, 14.29, variant)


def hard_features(dense: ModuleType, kind: str) -> tuple[Tensor, Tensor]:
    image, text = dense.pairs(40, 16)
    if kind == "identical":
        return image[:1].repeat(40, 1), image[:1].repeat(40, 1)
    if kind == "opposed":  # all cosines -1: every term of the fixed shift is flushed
        return image[:1].repeat(40, 1), -image[:1].repeat(40, 1)
    if kind == "aligned":
        return torch.eye(40, 64, dtype=torch.float64), torch.eye(40, 64, dtype=torch.float64)
    if kind == "zero":
        return image, torch.zeros_like(text)
    if kind == "long":
        return 30 * image, 30 * text
    return image, text


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scale", [1.0, 100.0, 400.0])
@pytest.mark.parametrize("features", ["random", "identical", "opposed", "aligned", "zero", "long"])
def test_extreme_features(dense: ModuleType, device: torch.device, features: str, scale: float) -> None:
    image, text = (x.to(device, torch.float32) for x in hard_features(dense, features))
    s = torch.tensor(scale, device=device)
    inputs = [x.requires_grad_() for x in (image, text, s)]
    weights = torch.ones(40, device=device)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    losses = dense.dense_loss(*exact)
    truth = [losses.detach(), *torch.autograd.grad(losses.sum(), exact)]
    got, _ = run(inputs, weights, backend="triton")
    # What rounding a logit to float32 does to everything behind it.
    largest = (exact[0] @ exact[1].T * scale).abs().max().item()
    slack = 6e-7 * max(1.0, largest)
    feature = max(x.abs().max().item() for x in exact[:2])
    sizes = [1.0, scale * feature, scale * feature, 40 * largest / scale]
    for a, b, size in zip(got, truth, sizes, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=slack * size)


@pytest.mark.parametrize("variant", ["softmax", "mask", "multi smoothing"])
def test_general_path_agrees(
    dense: ModuleType, device: torch.device, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a check that nothing passes, the online maxima and the two exponentials give the same, chunk by chunk."""
    from farl_kernels.contrastive import launchers

    image, text = (x.to(device, torch.float32).requires_grad_() for x in dense.pairs(150, 20))
    settings, _ = arguments(variant, 150, device)
    inputs = [image, text, torch.tensor(60.0, device=device, requires_grad=True)]
    weights = torch.linspace(-0.5, 2.0, 150, device=device)
    with small_blocks():
        fast, fast_metrics = run(inputs, weights, backend="triton", chunk_bytes=1, **settings)
        monkeypatch.setattr(launchers, "LEAST_TERM", 2.0**100)
        general, metrics = run(inputs, weights, backend="triton", chunk_bytes=1, **settings)
    assert metrics == fast_metrics
    assert not all(a.equal(b) for a, b in zip(fast, general, strict=True))
    for a, b in zip(general, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_are_equal_to_the_bit(dense: ModuleType, device: torch.device, deterministic: bool) -> None:
    image, text = (x.to(device, torch.float16).requires_grad_() for x in dense.pairs(140, 20))
    inputs = [image, text, torch.tensor(30.0, device=device, requires_grad=True)]
    weights = torch.linspace(-0.5, 2.0, 140, device=device)
    first, _ = run(inputs, weights, backend="triton", deterministic=deterministic)
    for _ in range(1 if device.type == "cpu" else 9):
        again, _ = run(inputs, weights, backend="triton", deterministic=deterministic)
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))


def test_layouts(dense: ModuleType, device: torch.device) -> None:
    image, text = (x.to(device, torch.float16) for x in dense.pairs(40, 24))
    scale = torch.tensor(9.0, device=device, requires_grad=True)
    weights = torch.ones(40, device=device)
    plain, _ = run([image.requires_grad_(), text.requires_grad_(), scale], weights, backend="triton")
    wide = torch.stack([image, image], dim=2).detach()
    sliced = torch.cat([text, text], dim=1).detach()[:, :24]
    again, _ = run([wide[:, :, 0].requires_grad_(), sliced.requires_grad_(), scale], weights, backend="triton")
    turned = text.detach().T.contiguous().T
    third, _ = run([image, turned.requires_grad_(), scale], weights, backend="triton")
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(plain, again, third, strict=True))
    one = image[:1].detach().expand(40, 24)
    expanded, _ = run([one.requires_grad_(), text, scale], weights, backend="triton")
    repeated, _ = run([one.detach().contiguous().requires_grad_(), text, scale], weights, backend="triton")
    assert all(a.equal(b) for a, b in zip(expanded, repeated, strict=True))


@pytest.mark.parametrize("live", range(3))
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_input_alone_needs_a_gradient(
    dense: ModuleType, device: torch.device, live: int, deterministic: bool
) -> None:
    image, text = (x.to(device, torch.float32) for x in dense.pairs(20, 8))
    whole = [x.requires_grad_() for x in (image, text, torch.tensor(9.0, device=device))]
    settings = {"label_smoothing": 0.1, "deterministic": deterministic, "backend": "triton"}
    (_, *full), _ = run(whole, torch.ones(20, device=device), **settings)
    inputs = [x.detach().requires_grad_(k == live) for k, x in enumerate(whole)]
    loss = contrastive_loss(*inputs, reduction="sum", **settings)
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.testing.assert_close(inputs[live].grad, full[live])


def test_collapsed_features_and_one_pair(device: torch.device) -> None:
    same = torch.zeros(8, 4, device=device)
    same[:, 0] = 1
    scale = torch.tensor(10.0, device=device)
    for kind in ("softmax", "sigmoid"):
        _, metrics = contrastive_loss(same, same, scale, kind=kind, return_metrics=True, backend="triton")
        assert metrics["image_to_text_accuracy"] == 0 == metrics["text_to_image_accuracy"]
    one = torch.ones(1, 4, device=device, requires_grad=True)
    loss = contrastive_loss(one, one.detach(), scale, backend="triton")
    assert isinstance(loss, Tensor) and loss == 0
    assert not torch.autograd.grad(loss, one)[0].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_where_it_belongs(dense: ModuleType, device: torch.device, bad: float) -> None:
    image, text = (x.to(device, torch.float32) for x in dense.pairs(9, 4))
    image[3, 2] = bad
    scale = torch.tensor(5.0, device=device)
    rows = contrastive_loss(image, text, scale, reduction="none", kind="sigmoid", backend="triton")
    assert isinstance(rows, Tensor)
    assert not rows[3].isfinite() and rows[torch.arange(9) != 3].isfinite().all()
    (losses, *gradients), _ = run(
        [x.requires_grad_() for x in (image, text, scale)],
        torch.ones(9, device=device),
        backend="triton",
    )
    assert losses.mean().isnan() and all(g.isnan().any() for g in gradients)


def test_float64_is_left_to_the_reference() -> None:
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: the kernels compute in float32"):
        contrastive_loss(torch.ones(2, 2).double(), torch.ones(2, 2).double(), torch.tensor(1.0), backend="triton")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def recorded(options: Options, count: int, backend: str = "triton") -> tuple[list[Launch], list[Launch]]:
    """The launches of a forward and of a backward pass of bfloat16 features [count, 512], on meta tensors."""
    bias = None if options.softmax else meta(dtype=torch.float32)
    ids = meta(count, dtype=torch.int64) if options.compares_ids else None
    tensors = meta(count, 512), meta(count, 512), meta(dtype=torch.float32), bias, ids
    settings = custom_ops.settings(options)
    with recorded_launches() as forward:
        _, _, *saved = custom_ops.run_forward(backend, *tensors, *settings)
    with recorded_launches() as backward:
        custom_ops.run_backward(
            backend, meta(count, dtype=torch.float32), *tensors, *saved, True, True, True, *settings
        )
    return forward, backward


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_value_is_asked_for(variant: str, deterministic: bool, backend: str) -> None:
    """Meta tensors have none: nothing waits for the device, and the step can be captured in a CUDA graph."""
    settings = dict(VARIANTS[variant])
    settings["metrics"] = settings.pop("return_metrics", False)
    forward, backward = recorded(Options(deterministic=deterministic, **settings), 640, backend)
    if backend == "triton" and not deterministic:
        # statistics, fold, both again for what needs the general path, pairs; terms, strip, again, a finish a tower
        assert (len(forward), len(backward)) == ((5, 5) if "kind" not in settings else (3, 3))


def test_the_strip_is_bounded() -> None:
    def strips(chunk_bytes: int | None) -> tuple[int, set[int]]:
        _, backward = recorded(Options(chunk_bytes=chunk_bytes), 8192)
        found = [launch for launch in backward if "strip" in launch.kernel.__name__]
        matrices = [x for launch in found for x in launch.args if isinstance(x, Tensor) and x.dim() == 2]
        found = [launch for launch in found if not launch.options["GENERAL"]]
        return len(found), {x.numel() * 2 for x in matrices if len(x) == 8192 and x.shape[1] != 512}

    assert strips(None) == (1, {8192 * 8192 * 2})
    count, sizes = strips(2**25)
    assert count == 4 and max(sizes) <= 2**25


def test_slots_are_bounded() -> None:
    forward, _ = recorded(Options(), 131072)
    sizes = [max(x.numel() * 4 for x in launch.args if isinstance(x, Tensor) and x.dim() == 1) for launch in forward]
    assert len(forward) > 5 and max(sizes) <= 2**27 < 131072 * 131072 // 32


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_keep_their_places(dense: ModuleType, device: torch.device, deterministic: bool) -> None:
    """A rank's rows from 70 on, as those of one process: in blocks that begin where that one's begin, bit for bit."""
    from farl_kernels.contrastive import launchers
    from farl_kernels.contrastive.reference import AxisTerms, Tile

    image, text = (x.to(device, torch.float16) for x in dense.pairs(150, 20))
    options, scale = Options(deterministic=deterministic), torch.tensor(30.0, device=device)

    def rows(start: int, stop: int) -> tuple[list[Tensor], int]:
        tile = Tile(image[start:stop], text, start, scale, None, None, None, options)
        weights, lses = torch.full((150,), 0.01, device=device), torch.full((150,), 20.0, device=device).double()
        terms = [AxisTerms(weights[:k], lses[:k]) for k in (stop - start, 150)]
        needs = {"need_rows": True, "need_columns": False, "need_scalars": False}
        with recorded_launches() as launches:
            launchers.gradients(tile, *terms, **needs)
        blocks = next(launch for launch in launches if "strip" in launch.kernel.__name__).grid[0]
        found, _ = launchers.statistics(tile, with_columns=False)
        gradients = launchers.gradients(tile, *terms, **needs).rows
        assert gradients is not None
        return [found["lse"], gradients], blocks

    with small_blocks():
        whole, _ = rows(0, 150)
        part, blocks = rows(70, 100)  # from the 6th row of a block of 64 to its 36th
        straddling, more = rows(100, 140)  # from the 36th over the end to the 12th of the next
    assert (blocks, more) == ((10, 20) if deterministic else (10, 10))
    if deterministic:
        for x, y, z in zip(whole, part, straddling, strict=True):
            assert x[70:100].equal(y) and x[100:140].equal(z)


def test_one_bad_row_changes_no_other(dense: ModuleType, device: torch.device) -> None:
    """Bits do not depend on which neighbours need the general path, so neither on the ranks these are on."""
    from farl_kernels.contrastive import launchers
    from farl_kernels.contrastive.reference import AxisTerms, Tile

    image, text = (x.to(device, torch.float32) for x in dense.pairs(40, 20))
    long = image.clone()
    long[3] *= 30
    scale = torch.tensor(100.0, device=device)
    weights = torch.ones(40, device=device)

    def rows(features: Tensor) -> list[Tensor]:
        tile = Tile(features, text, 0, scale, None, None, None, Options(deterministic=True))
        row, _ = launchers.statistics(tile, with_columns=False)
        lses = torch.logaddexp(row["lse"], 100 * (features * text).sum(1).double())
        terms = AxisTerms(weights, lses), AxisTerms(weights, torch.full_like(lses, 100.0))
        part = launchers.gradients(tile, *terms, need_rows=True, need_columns=False, need_scalars=False)
        assert part.rows is not None
        return [row["lse"], part.rows]

    others = torch.arange(40, device=device) != 3
    for a, b in zip(rows(image), rows(long), strict=True):
        assert a[others].equal(b[others]) and a.isfinite().all() and not a[3].equal(b[3])
