"""The Triton backend of the masked-token loss against float64 truth and the reference in the same dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels import tables
from farl_kernels.token_loss import custom_ops, masked_token_cross_entropy, reference

launchers = pytest.importorskip("farl_kernels.token_loss.launchers")
Leaves = tuple[Tensor, Tensor, Tensor | None]


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, *, ignored: float = 0.3, seed: int = 0
) -> tuple[Leaves, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype).requires_grad_()

    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -1
    return (leaf(rows, width), leaf(vocab, width), leaf(vocab)), targets.to(device)


def results(leaves: Leaves, targets: Tensor, upstream: float = 1.5, **options: object) -> list[Tensor]:
    """Loss, correct, count and the gradients of the leaves."""
    loss, correct, count = masked_token_cross_entropy(*leaves, targets, **options)
    wanted = [x for x in leaves if x is not None]
    return [loss, correct, count, *torch.autograd.grad(upstream * loss, wanted)]


def truth(leaves: Leaves, targets: Tensor, **options: object) -> list[Tensor]:
    exact = tuple(None if x is None else x.detach().double().requires_grad_() for x in leaves)
    return results(exact, targets, backend="reference", **options)


def check_all(
    check_error: Callable[..., None], leaves: Leaves, targets: Tensor, *, gradient_factor: float = 3, **options: object
) -> list[Tensor]:
    got = results(leaves, targets, backend="triton", **options)
    same_dtype = results(leaves, targets, backend="reference", **options)
    exact = truth(leaves, targets, **options)
    check_error(got[0], same_dtype[0], exact[0], factor=2, name="loss")
    assert got[1].dtype == torch.float32 and got[2].dtype == torch.int64
    assert got[1] == same_dtype[1] and got[2] == exact[2]
    for name, *three in zip(("hidden", "weight", "bias"), got[3:], same_dtype[3:], exact[3:], strict=False):
        check_error(*three, factor=gradient_factor, name=f"gradient of {name}")
    return got


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows of fewer than 64 tokens."""
    for module in (reference, launchers):
        monkeypatch.setattr(module, "logit_chunk_bytes", lambda device: 4 * 64 * 5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(9, 16, 64), (17, 5, 37), (1, 3, 1), (13, 8, 512)])
def test_right(
    kernel_dtype: torch.dtype,
    device: torch.device,
    check_error: Callable[..., None],
    reduction: str,
    rows: int,
    width: int,
    vocab: int,
) -> None:
    leaves, targets = inputs(rows, width, vocab, kernel_dtype, device)
    check_all(check_error, leaves, targets, reduction=reduction)


@pytest.mark.usefixtures("poisoned", "small_chunks")
@pytest.mark.parametrize("rows", [5, 6, 10, 11])
def test_chunks(kernel_dtype: torch.dtype, device: torch.device, check_error: Callable[..., None], rows: int) -> None:
    leaves, targets = inputs(rows, 6, 64, kernel_dtype, device)
    check_all(check_error, leaves, targets)


@pytest.mark.usefixtures("poisoned", "small_chunks")
@pytest.mark.parametrize("vocab", [64, 61, 33])
@pytest.mark.parametrize("with_bias", [True, False])
def test_rows_longer_than_a_block(
    kernel_dtype: torch.dtype,
    device: torch.device,
    check_error: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    vocab: int,
    with_bias: bool,
) -> None:
    monkeypatch.setattr(launchers, "_LONGEST_ROW", 32)
    monkeypatch.setattr(launchers, "_BUCKETS", ())
    leaves, targets = inputs(7, 6, vocab, kernel_dtype, device)
    config = {"BLOCK_V": 16, "ROWS": 2, "num_warps": 4, "num_stages": 1}
    bucket = launchers.bucket(vocab, kernel_dtype)
    with tables.override("token_loss", "row", bucket, config):
        check_all(check_error, (*leaves[:2], leaves[2] if with_bias else None), targets)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("vocab", [1000, 1024, 4097, 8191, 8192, 8193, 16384])
def test_real_vocabularies(
    kernel_dtype: torch.dtype, device: torch.device, check_error: Callable[..., None], vocab: int
) -> None:
    leaves, targets = inputs(11, 16, vocab, kernel_dtype, device)
    check_all(check_error, leaves, targets)


@pytest.mark.usefixtures("poisoned")
def test_without_bias_and_with_bias_of_another_dtype(
    kernel_dtype: torch.dtype, device: torch.device, check_error: Callable[..., None]
) -> None:
    (hidden, weight, bias), targets = inputs(9, 6, 40, kernel_dtype, device)
    check_all(check_error, (hidden, weight, None), targets)
    got = check_all(check_error, (hidden, weight, bias.detach().float().requires_grad_()), targets)
    assert got[5].dtype == torch.float32


@pytest.mark.usefixtures("poisoned")
def test_strided_inputs(kernel_dtype: torch.dtype, device: torch.device, check_error: Callable[..., None]) -> None:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, kernel_dtype)

    hidden = draw(12, 22)[1::2, 3:11].detach().requires_grad_()
    weight = draw(8, 40).t().detach().requires_grad_()
    bias = draw(1).expand(40).detach().requires_grad_()
    targets = torch.tensor([3, 9, -1, 9, 39, 9, 0, 9, 11, 9, 12, 9], device=device)[::2]
    check_all(check_error, (hidden, weight, bias), targets)


def test_float16_keeps_small_gradients(device: torch.device, check_error: Callable[..., None]) -> None:
    # Softmax entries of about 1e-8, which float16 alone rounds to zero.
    leaves, targets = inputs(6, 4, 64, torch.float16, device, ignored=0)
    bias = torch.full((64,), -18.0, dtype=torch.float16, device=device)
    bias[0] = 0
    targets[:] = 0
    leaves = (leaves[0].detach() * 0.1, leaves[1].detach() * 0.1, bias)
    leaves = tuple(x.requires_grad_() for x in leaves)
    got = results(leaves, targets, upstream=2.0**14, backend="triton")
    exact = truth(leaves, targets, upstream=2.0**14)
    wanted = exact[4][1:]
    assert (got[4][1:].double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.usefixtures("poisoned")
def test_ignored_rows(device: torch.device) -> None:
    leaves, targets = inputs(10, 4, 24, torch.float32, device)
    hidden, weight, bias = leaves
    bad = hidden.detach().clone()
    bad[targets == -1] = float("nan")
    plain = results(leaves, targets, backend="triton")
    got = results((bad.requires_grad_(), weight, bias), targets, backend="triton")
    assert got[3][targets == -1].eq(0).all()
    assert got[0].equal(plain[0]) and got[3].equal(plain[3]) and got[5].equal(plain[5])
    nothing = results(leaves, torch.full_like(targets, -1), backend="triton")
    assert not any(x.any() for x in nothing)


def test_a_target_that_is_no_token_shows(device: torch.device) -> None:
    leaves, targets = inputs(4, 3, 24, torch.float32, device, ignored=0)
    for wrong in (24, -2):
        assert masked_token_cross_entropy(
            *leaves, targets.index_fill(0, targets.new_tensor(1), wrong), backend="triton"
        )[0].isnan()


def test_the_first_of_equal_logits_is_the_guess(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.ones(5, 2, device=device), torch.ones(40, 2, device=device)
    targets = torch.tensor([0, 0, 1, 17, 39], device=device)
    assert masked_token_cross_entropy(hidden, weight, None, targets, backend="triton")[1] == 2
    monkeypatch.setattr(launchers, "_LONGEST_ROW", 32)
    monkeypatch.setattr(launchers, "_BUCKETS", ())
    config = {"BLOCK_V": 16, "ROWS": 2, "num_warps": 4, "num_stages": 1}
    with tables.override("token_loss", "row", "bits32_long", config):
        assert masked_token_cross_entropy(hidden, weight, None, targets, backend="triton")[1] == 2


@pytest.mark.parametrize(("rows", "vocab", "width"), [(0, 7, 3), (4, 7, 0)])
def test_empty(device: torch.device, rows: int, vocab: int, width: int) -> None:
    leaves, targets = inputs(rows, width, vocab, torch.float32, device, ignored=0)
    got, wanted = results(leaves, targets, backend="triton"), results(leaves, targets, backend="reference")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@given(
    st.integers(1, 20), st.integers(1, 6), st.integers(1, 70), st.floats(0, 1), st.integers(1, 4096), st.integers(1, 9)
)
@settings(max_examples=15, deadline=None)
def test_equals_the_reference(
    rows: int, width: int, vocab: int, ignored: float, chunk_bytes: int, rows_a_program: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    leaves, targets = inputs(rows, width, vocab, torch.float32, device, ignored=ignored, seed=rows)
    config = {"ROWS": rows_a_program, "num_warps": 4, "num_stages": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "logit_chunk_bytes", lambda device: chunk_bytes)
        with tables.override("token_loss", "row", "bits32_1024", config):
            got = results(leaves, targets, backend="triton")
    for a, b in zip(got, results(leaves, targets, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("small_chunks")
def test_run_to_run_equality(kernel_dtype: torch.dtype, device: torch.device) -> None:
    leaves, targets = inputs(23, 6, 50, kernel_dtype, device)
    first, second = (results(leaves, targets, backend="triton") for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_only_what_is_needed_is_made(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, bias), targets = inputs(9, 4, 24, torch.float32, device)
    wanted = results((hidden, weight, bias), targets, backend="triton")[3:]
    asked: list[tuple[bool, ...]] = []
    plain = custom_ops.forward
    monkeypatch.setattr(custom_ops, "forward", lambda *args: asked.append(args[6:9]) or plain(*args))
    for needs in itertools.product((True, False), repeat=3):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True)]
        loss = masked_token_cross_entropy(*leaves, targets, backend="triton")[0]
        assert asked.pop() == needs
        if any(needs):
            (1.5 * loss).backward()
        for leaf, need, gradient in zip(leaves, needs, wanted, strict=True):
            assert (leaf.grad is not None) == need
            assert not need or leaf.grad.equal(gradient)
    with torch.no_grad():
        masked_token_cross_entropy(hidden, weight, bias, targets, backend="triton")
    assert asked.pop() == (False, False, False)
