from __future__ import annotations

import pytest
import torch

from farl_kernels.patch_masking import mask_patches, mask_positions

BACKENDS = ["torch", "reference"]
MODES = ["fork", "mask", "gather", "plain"]


def _inputs(batch: int = 3, patches: int = 6, channels: int = 4, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    mask = torch.rand(batch, patches, generator=generator) < 0.4
    mask[0], mask[-1] = True, False
    return {
        "embeddings": normal(batch, patches, channels),
        "mask": mask,
        "mask_token": normal(channels),
        "class_token": normal(channels),
        "position_embedding": normal(patches + 1, channels),
        "visible": mask_positions(~mask, patches - 1),
    }


def _call(inputs: dict, mode: str, backend: str | None = None, **changes) -> torch.Tensor:
    arguments = inputs | changes
    embeddings, mask = arguments.pop("embeddings"), arguments.pop("mask")
    if mode != "gather" and "visible" not in changes:
        arguments.pop("visible")
    if mode == "plain":
        mask, arguments["mask_token"] = None, None
    return mask_patches(embeddings, mask, mode=mode, backend=backend, **arguments)


def _parameters(inputs: dict, mode: str) -> list[str]:
    names = ["embeddings", "class_token", "position_embedding"]
    return names if mode in ("gather", "plain") else [*names, "mask_token"]


def _by_loops(inputs: dict, mode: str) -> torch.Tensor:
    """The definition, one row at a time."""
    e, m, positions = inputs["embeddings"], inputs["mask"], inputs["position_embedding"]
    clean, masked, gathered = [], [], []
    for b in range(len(e)):
        first = inputs["class_token"] + positions[0]
        rows = [e[b, p] + positions[p + 1] for p in range(e.shape[1])]
        hidden = [inputs["mask_token"] + positions[p + 1] if m[b, p] else rows[p] for p in range(e.shape[1])]
        clean.append(torch.stack([first, *rows]))
        masked.append(torch.stack([first, *hidden]))
        kept = [rows[p] if p >= 0 else torch.zeros_like(first) for p in inputs["visible"][b].tolist()]
        gathered.append(torch.stack([first, *kept]))
    return torch.stack({"fork": clean + masked, "mask": masked, "gather": gathered, "plain": clean}[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_the_definition(mode: str, backend: str) -> None:
    inputs = _inputs()
    found, expected = _call(inputs, mode, backend), _by_loops(inputs, mode)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    tensors = [inputs[name] for name in _parameters(inputs, mode)]
    grad = torch.randn(expected.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_second_derivatives(mode: str, backend: str) -> None:
    inputs = _inputs(2, 4, 2)
    names = _parameters(inputs, mode)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return _call(inputs, mode, backend, **dict(zip(names, tensors, strict=True)))

    tensors = tuple(inputs[name] for name in names)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(lambda *t: call(*t) ** 2, tensors)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_penalty_equals_the_reference_s(mode: str) -> None:
    """A norm of first gradients is differentiated again: a backward that drops that term would give zero."""
    results = []
    for backend in BACKENDS:
        inputs = _inputs()
        tensors = [inputs[name] for name in _parameters(inputs, mode)]
        loss = _call(inputs, mode, backend).pow(3).sum()
        penalty = sum(g.pow(2).sum() for g in torch.autograd.grad(loss, tensors, create_graph=True))
        results.append(torch.autograd.grad(penalty, tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_that_of_the_reference(mode: str, dtype: torch.dtype) -> None:
    inputs = _inputs(32, 49, 64, dtype)
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    names = _parameters(inputs, mode)
    truth = _call(exact, mode, "reference")
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    true_grads = torch.autograd.grad(truth, [exact[n] for n in names], grad.double())
    outputs = {backend: _call(inputs, mode, backend) for backend in BACKENDS}
    assert torch.equal(outputs["torch"], outputs["reference"]) and outputs["torch"].dtype == dtype
    errors = {}
    for backend, output in outputs.items():
        grads = torch.autograd.grad(output, [inputs[n] for n in names], grad)
        errors[backend] = [float((a.double() - b).abs().max()) for a, b in zip(grads, true_grads, strict=True)]
        assert [g.dtype for g in grads] == [dtype] * len(names)
    for name, a, b in zip(names, errors["torch"], errors["reference"], strict=True):
        assert a <= 3 * b + 1e-6, f"{name}: {a} against {b}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_embeddings_with_fp32_parameters_under_autocast(mode: str, backend: str) -> None:
    inputs = _inputs(64, 16, 8, torch.float32)
    half = inputs["embeddings"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = _call(inputs, mode, backend, embeddings=half)
        assert output.dtype == torch.bfloat16
        # The sum is rounded once: the parameters are not rounded before it.
        assert torch.equal(output, _by_loops(inputs | {"embeddings": half.float()}, mode).bfloat16())
        output.float().pow(2).sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in exact.items()}
    truth = _call(exact, mode, "reference", embeddings=half.detach().double())
    truth.backward(2 * output.detach().double())
    for name in _parameters(inputs, mode)[1:]:
        assert inputs[name].grad.dtype == torch.float32
        error = (inputs[name].grad - exact[name].grad).abs().max() / exact[name].grad.abs().max()
        # fp32 sums of bf16 gradients; a sum in bf16 would be off by 1e-2.
        assert error < (1e-5 if backend == "torch" else 3e-2), name


@pytest.mark.parametrize("mode", MODES)
def test_strided_inputs_and_expanded_gradients(mode: str) -> None:
    inputs = _inputs()
    wide = torch.randn(6, 3, 8, dtype=torch.float64)
    strided = wide.transpose(0, 1)[:, :, ::2].detach().requires_grad_()
    output = _call(inputs, mode, embeddings=strided, mask=inputs["mask"].T.contiguous().T)
    assert torch.equal(output, _by_loops(inputs | {"embeddings": strided}, mode))
    output.sum().backward()  # an expanded gradient
    assert strided.grad is not None
    if mode == "fork":
        assert torch.equal(strided.grad, 2.0 - inputs["mask"][:, :, None].double().expand_as(strided))


@pytest.mark.parametrize("mode", MODES)
def test_backward_is_equal_from_run_to_run(mode: str) -> None:
    inputs = _inputs(64, 49, 32, torch.float32)
    tensors = [inputs[name] for name in _parameters(inputs, mode)]
    output = _call(inputs, mode)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(output, tensors, grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_takes_its_gradients(mode: str, backend: str) -> None:
    inputs = {k: v.detach() for k, v in _inputs().items()}
    names = _parameters(inputs, mode)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return _call(inputs, mode, backend, **dict(zip(names, tensors, strict=True))).sin().sum()

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    found = torch.func.grad(loss, argnums=tuple(range(len(names))))(*(inputs[name] for name in names))
    for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_leading_ones_of_parameters_are_dropped() -> None:
    inputs = _inputs()
    shaped = {
        "class_token": inputs["class_token"][None, None],
        "mask_token": inputs["mask_token"][None, None],
        "position_embedding": inputs["position_embedding"][None],
    }
    assert torch.equal(_call(inputs, "fork", **shaped), _call(inputs, "fork"))


def test_no_gradient_is_asked_of_frozen_inputs() -> None:
    inputs = {k: v.detach() for k, v in _inputs().items()}
    assert not _call(inputs, "fork").requires_grad
    token = inputs["mask_token"].requires_grad_()
    (grad,) = torch.autograd.grad(_call(inputs, "fork").sum(), [token])
    assert torch.equal(grad, inputs["mask"].sum().double().expand(4))


@pytest.mark.parametrize(
    ("mode", "change", "name"),
    [
        ("clean", {}, "mode"),
        ("fork", {"embeddings": torch.zeros(3, 6)}, "embeddings"),
        ("fork", {"mask": None}, "mask"),
        ("fork", {"mask": torch.zeros(3, 6)}, "mask"),
        ("mask", {"mask": torch.zeros(3, 7, dtype=torch.bool)}, "mask"),
        ("mask", {"mask_token": None}, "mask_token"),
        ("mask", {"mask_token": torch.zeros(5)}, "mask_token"),
        ("fork", {"class_token": torch.zeros(4, dtype=torch.int64)}, "class_token"),
        ("fork", {"position_embedding": torch.zeros(6, 4)}, "position_embedding"),
        ("gather", {"visible": None}, "visible"),
        ("gather", {"visible": torch.zeros(2, 2, dtype=torch.int32)}, "visible"),
        ("gather", {"visible": torch.zeros(3, 2)}, "visible"),
        ("fork", {"visible": torch.zeros(3, 2, dtype=torch.int32)}, "visible"),
        ("plain", {"visible": torch.zeros(3, 2, dtype=torch.int32)}, "visible"),
        ("fork", {"mask": torch.zeros(3, 6, dtype=torch.bool, device="meta")}, "mask"),
        ("fork", {"backend": "nonsense"}, "backend"),
    ],
)
def test_wrong_arguments_are_named(mode: str, change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^mask_patches: {name} "):
        _call(_inputs(), mode, **change)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode: str) -> None:
    inputs = _inputs()
    found = torch.compile(lambda e: _call(inputs, mode, embeddings=e), fullgraph=True, backend="aot_eager")(
        inputs["embeddings"]
    )
    assert torch.equal(found, _call(inputs, mode))
    (grad,) = torch.autograd.grad(found.pow(2).sum(), [inputs["embeddings"]])
    (expected,) = torch.autograd.grad(_call(inputs, mode).pow(2).sum(), [inputs["embeddings"]])
    torch.testing.assert_close(grad, expected)
