"""`mask_patches` by Triton kernels: natively on a GPU, else in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farl_kernels import tables
from farl_kernels.launch import recorded_launches
from farl_kernels.patch_masking import custom_ops, launchers, mask_patches, mask_positions, reference

MODES = ["fork", "mask", "gather", "plain"]
Inputs = dict[str, Tensor]


def _inputs(
    device: torch.device,
    batch: int = 3,
    patches: int = 3,
    channels: int = 24,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    mask = torch.rand(batch, patches, generator=generator) < 0.4
    mask[:1], mask[1:2] = True, False
    given = parameters or dtype
    return {
        "embeddings": normal(dtype, batch, patches, channels),
        "mask_token": normal(given, channels),
        "class_token": normal(given, channels),
        "position_embedding": normal(given, patches + 1, channels),
        "mask": mask.to(device),
        "visible": mask_positions(~mask, max(1, patches - 1)).to(device),
    }


def _call(inputs: Inputs, mode: str, backend: str = "triton") -> Tensor:
    choosing = mode in ("fork", "mask")
    return mask_patches(
        inputs["embeddings"],
        inputs["mask"] if choosing else None,
        mask_token=inputs["mask_token"] if choosing else None,
        class_token=inputs["class_token"],
        position_embedding=inputs["position_embedding"],
        mode=mode,
        visible=inputs["visible"] if mode == "gather" else None,
        backend=backend,
    )


def _names(mode: str) -> list[str]:
    names = ["embeddings", "class_token", "position_embedding"]
    return [*names, "mask_token"] if mode in ("fork", "mask") else names


def _double(inputs: Inputs) -> Inputs:
    return {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}


def _grads(output: Tensor, inputs: Inputs, mode: str, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, [inputs[n] for n in _names(mode)], grad.to(output.dtype)))


def _compare(inputs: Inputs, mode: str, check_error: Callable[..., None], grad: Tensor | None = None) -> None:
    """Result and gradients against float64 and against the plain version in the same dtypes."""
    found, plain, exact = _call(inputs, mode), _call(inputs, mode, "reference"), _double(inputs)
    truth = _call(exact, mode, "reference")
    check_error(found, plain, truth, factor=2)
    assert found.is_contiguous()
    if grad is None:
        grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(found)
    grads = (_grads(output, of, mode, grad) for output, of in ((found, inputs), (plain, inputs), (truth, exact)))
    for name, a, b, c in zip(_names(mode), *grads, strict=True):
        check_error(a, b, c, factor=3, name=name)
        assert a.is_contiguous()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(
    device: torch.device, kernel_dtype: torch.dtype, check_error: Callable[..., None], mode: str
) -> None:
    _compare(_inputs(device, 3, 5, 300, kernel_dtype), mode, check_error)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
def test_16_bit_embeddings_with_fp32_parameters(
    device: torch.device, check_error: Callable[..., None], mode: str
) -> None:
    """The sum is rounded once, and parameters get fp32 gradients."""
    inputs = _inputs(device, 3, 5, 24, torch.float16, torch.float32)
    _compare(inputs, mode, check_error)
    assert torch.equal(_call(inputs, mode), _call(inputs, mode, "reference"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 20, pytest.param(150, marks=pytest.mark.slow)])
def test_batches_of_several_tiles_and_slabs(
    device: torch.device, check_error: Callable[..., None], mode: str, batch: int
) -> None:
    small = {"STEPS": 2, "IMAGES": 4, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1}
    with tables.override("patch_masking", "mask_patches_backward", "bits32", small):
        _compare(_inputs(device, batch, 3, 24), mode, check_error)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("patches", "channels"), [(1, 8), (5, 768), (49, 192), (196, 16)])
def test_sizes(
    device: torch.device,
    kernel_dtype: torch.dtype,
    check_error: Callable[..., None],
    mode: str,
    patches: int,
    channels: int,
) -> None:
    _compare(_inputs(device, 2, patches, channels, kernel_dtype), mode, check_error)


@pytest.mark.parametrize("mode", MODES)
def test_strided_inputs_and_expanded_gradients(
    device: torch.device, check_error: Callable[..., None], mode: str
) -> None:
    inputs = _inputs(device, 3, 2, 8)
    wide = torch.randn(2, 3, 16, device=device)
    wider = torch.randn(3, 16, device=device)
    strided = {
        "mask": inputs["mask"].T.contiguous().T,
        "visible": inputs["visible"].long().T.contiguous().T,
        "mask_token": wider[0, ::2].detach().requires_grad_(),
        "class_token": wider[:, 3][:1].expand(8).detach().requires_grad_(),
        "position_embedding": wider[:, ::2].detach().requires_grad_(),
    }
    shape = _call(inputs, mode).shape
    for embeddings, grad in (
        (wide.transpose(0, 1)[:, :, :8], torch.ones((), device=device).expand(shape)),
        (wide.transpose(0, 1)[:, :, ::2], torch.randn(*shape[:2], 16, device=device)[:, :, :8]),
        (wide[:1, :1, :8], torch.randn(shape[1], shape[0], 8, device=device).transpose(0, 1)),
    ):
        given = strided | {"embeddings": embeddings.expand(3, 2, 8).detach().requires_grad_()}
        _compare(given, mode, check_error, grad)


@pytest.mark.parametrize("mode", MODES)
def test_leading_dimensions_of_parameters(device: torch.device, mode: str) -> None:
    inputs = _inputs(device)
    timm = {k: inputs[k].detach()[None, None].requires_grad_() for k in ("mask_token", "class_token")}
    timm["position_embedding"] = inputs["position_embedding"].detach()[None].requires_grad_()
    output = _call(inputs | timm, mode)
    assert torch.equal(output, _call(inputs, mode))
    grads = _grads(output, inputs | timm, mode, torch.ones_like(output))
    for name, grad in zip(_names(mode), grads, strict=True):
        assert grad.shape == (inputs | timm)[name].shape


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_needed_is_computed(mode: str) -> None:
    """Launches, and outputs that are not needed have no elements."""
    mask = torch.empty(4, 6, dtype=torch.bool, device="meta") if mode in ("fork", "mask") else None
    visible = torch.empty(4, 3, dtype=torch.int32, device="meta") if mode == "gather" else None
    grad = torch.empty(8 if mode == "fork" else 4, 4 if mode == "gather" else 7, 16, device="meta")
    dtypes = torch.float32, None if mask is None else torch.float32, torch.float32, torch.float32
    extra = 1 if mode == "gather" else 0
    with recorded_launches() as launches:
        launchers.mask_patches_backward(grad, mask, visible, 6, *dtypes, mode)
    assert len(launches) == 2 + extra
    with recorded_launches() as launches:
        found = launchers.mask_patches_backward(grad, mask, visible, 6, torch.float32, None, None, None, mode)
    assert len(launches) == 1 + extra and [x.numel() for x in found] == [4 * 6 * 16, 0, 0, 0]
    with recorded_launches() as launches:
        embeddings, vector, rows = (torch.empty(s, device="meta") for s in ((4, 6, 16), (16,), (7, 16)))
        launchers.mask_patches(embeddings, mask, None if mask is None else vector, vector, rows, visible, mode)
    assert len(launches) == 1


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_some_inputs(device: torch.device, mode: str) -> None:
    whole = _inputs(device)
    output = _call(whole, mode)
    grad = torch.randn_like(output)
    expected = dict(zip(_names(mode), _grads(output, whole, mode, grad), strict=True))
    for name in _names(mode):
        inputs = {k: v.detach() for k, v in whole.items()}
        inputs[name].requires_grad_()
        (found,) = torch.autograd.grad(_call(inputs, mode), [inputs[name]], grad)
        assert torch.equal(found, expected[name])
    assert not _call({k: v.detach() for k, v in whole.items()}, mode).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches(device: torch.device, mode: str) -> None:
    inputs = _inputs(device, 0)
    output = _call(inputs, mode)
    assert output.shape == (0, 3 if mode == "gather" else 4, 24)
    for name, grad in zip(_names(mode), _grads(output, inputs, mode, output), strict=True):
        assert torch.equal(grad, torch.zeros_like(inputs[name]))


def test_no_visible_patch(device: torch.device) -> None:
    inputs = _inputs(device)
    inputs["visible"] = inputs["visible"][:, :0]
    output = _call(inputs, "gather")
    assert torch.equal(output, _call(inputs, "gather", "reference"))
    embeddings, class_token, position = _grads(output, inputs, "gather", torch.ones_like(output))
    assert not embeddings.any() and (class_token == 3).all() and not position[1:].any()
    inputs["visible"] = torch.full((3, 4), -1, device=device)
    assert torch.equal(_call(inputs, "gather"), _call(inputs, "gather", "reference"))


@pytest.mark.parametrize("mode", MODES)
def test_equal_from_run_to_run(device: torch.device, mode: str) -> None:
    inputs = _inputs(device, 20, 2, 24)
    output = _call(inputs, mode)
    grad = torch.randn_like(output)
    first = _grads(_call(inputs, mode), inputs, mode, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, _grads(output, inputs, mode, grad), strict=True))


def test_two_backward_passes_add_up(device: torch.device) -> None:
    """No two gradients share memory."""
    inputs = _inputs(device)
    output = _call(inputs, "fork")
    grad = torch.randn_like(output)
    expected = _grads(output, inputs, "fork", grad)
    for _ in range(2):
        _call(inputs, "fork").backward(grad)
    for name, once in zip(_names("fork"), expected, strict=True):
        torch.testing.assert_close(inputs[name].grad, 2 * once)


def test_infinite_gradients_of_masked_patches_stay_there(device: torch.device) -> None:
    inputs = _inputs(device)
    output = _call(inputs, "mask")
    grad = torch.ones_like(output)
    grad[:, 1:][inputs["mask"]] = torch.inf
    embeddings, *_ = _grads(output, inputs, "mask", grad)
    assert torch.equal(embeddings, (~inputs["mask"])[:, :, None].float().expand_as(embeddings))


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_a_batch_does_not_matter(device: torch.device, mode: str) -> None:
    inputs = _inputs(device, 5)
    order = torch.tensor([3, 0, 4, 2, 1], device=device)
    turned = inputs | {k: inputs[k].detach()[order] for k in ("embeddings", "mask", "visible")}
    found, expected = _call(turned, mode), _call(inputs, mode)
    halves = zip(found.split(5), expected.split(5), strict=True)
    assert all(torch.equal(a, b[order]) for a, b in halves)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_mask(data: st.DataObject) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, patches = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    inputs = _inputs(device, batch, patches, data.draw(st.sampled_from([1, 7, 16])))
    bits = st.lists(st.booleans(), min_size=batch * patches, max_size=batch * patches)
    mask = torch.tensor(data.draw(bits)).view(batch, patches)
    count = data.draw(st.integers(1, patches))
    inputs |= {"mask": mask.to(device), "visible": mask_positions(~mask, count).flip(1).to(device)}
    for mode in MODES:
        found, expected = _call(inputs, mode), _call(inputs, mode, "torch")
        assert torch.equal(found, expected)
        grad = torch.randn_like(found)
        grads = (_grads(output, inputs, mode, grad) for output in (found, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_the_plain_backward_is_the_gradient(mode: str) -> None:
    inputs = _double(_inputs(torch.device("cpu")))
    output = _call(inputs, mode, "reference")
    grad = torch.randn_like(output)
    dtypes = torch.float64, torch.float64 if "mask_token" in _names(mode) else None, torch.float64, torch.float64
    mask = inputs["mask"] if "mask_token" in _names(mode) else None
    found = reference.mask_patches_backward(
        grad, mask, inputs["visible"] if mode == "gather" else None, 3, *dtypes, mode
    )
    by_name = dict(zip(("embeddings", "mask_token", "class_token", "position_embedding"), found, strict=True))
    for name, expected in zip(_names(mode), _grads(output, inputs, mode, grad), strict=True):
        torch.testing.assert_close(by_name[name], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("mode", ["fork", "gather", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES[1::2])])
def test_raw_ops(device: torch.device, backend: str, mode: str) -> None:
    inputs = {k: v.detach() for k, v in _inputs(device, 2, 3, 4).items()}
    choosing = mode in ("fork", "mask")
    mask, visible = inputs["mask"] if choosing else None, inputs["visible"] if mode == "gather" else None
    token = inputs["mask_token"] if choosing else None
    args = inputs["embeddings"], mask, token, inputs["class_token"], inputs["position_embedding"], visible, mode
    torch.library.opcheck(custom_ops.mask_forward, (*args, backend))
    grad = torch.randn_like(_call(inputs, mode))
    for dtypes in (
        (torch.float16, torch.float32 if choosing else None, torch.float32, torch.float16),
        (None, None, None, torch.float32),
    ):
        torch.library.opcheck(custom_ops.mask_backward, (grad, mask, visible, 3, *dtypes, mode, backend))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_without_a_graph_break(device: torch.device, mode: str, dynamic: bool) -> None:
    torch.compiler.reset()  # all modes compile the same code

    def compute(*tensors: Tensor) -> Tensor:
        return _call(dict(zip(inputs, tensors, strict=True)), mode).sin() * 2

    inputs = _inputs(device, 2, 2, 8)
    compiled = torch.compile(compute, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3) if dynamic else (2,):
        inputs = _inputs(device, batch, 2, 8)
        found, expected = compiled(*inputs.values()), compute(*inputs.values())
        assert torch.equal(found, expected)
        grad = torch.randn_like(found)
        grads = (_grads(output, inputs, mode, grad) for output in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_compiles_with_inductor(device: torch.device) -> None:
    inputs = _inputs(device, 2, 3, 8)

    def compute(embeddings: Tensor) -> Tensor:
        return _call(inputs | {"embeddings": 2 * embeddings}, "fork").sin()

    found, expected = torch.compile(compute, fullgraph=True)(inputs["embeddings"]), compute(inputs["embeddings"])
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for a, b in zip(*(_grads(output, inputs, "fork", grad) for output in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_are_refused(device: torch.device, mode: str) -> None:
    inputs = _inputs(device)
    loss = _call(inputs, mode).pow(2).sum()
    with pytest.raises(RuntimeError, match="mask_patches: for gradients of gradients"):
        torch.autograd.grad(loss, inputs["embeddings"], create_graph=True)


def test_refusals(device: torch.device) -> None:
    inputs = _inputs(device)
    for name in ("embeddings", "position_embedding", "mask_token"):
        with pytest.raises(ValueError, match=r"mask_patches: backend 'triton' cannot run this call: .* are float64"):
            _call(inputs | {name: inputs[name].double()}, "fork")
