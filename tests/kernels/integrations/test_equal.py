"""An accelerated model gives the outputs and gradients of its original."""

from __future__ import annotations

import copy

import pytest
import torch

NAMES = [
    "timm vit_base_patch16_224",
    "timm vit_large_patch14_clip_224",
    "timm eva02_base_patch16_clip_224",
    "open_clip ViT-B-16",
    "open_clip ViT-B-16-quickgelu",
    "transformers CLIP",
    "transformers ViT",
]
# Of each kind of block one.
COMPILED = [NAMES[0], NAMES[2], NAMES[3], NAMES[5], NAMES[6]]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_float64(name, training, make, check_equal) -> None:
    subject = make(name, size="shallow" if training else "narrow")
    subject.model.train(training)
    truth = subject.run(subject.model)
    assert len(truth[1]) == len(list(subject.model.parameters()))
    keys = list(subject.model.state_dict())
    report = subject.accelerate(subject.model)
    assert not [x for x in report.left if x.kind != "SwiGLU"], report
    assert list(subject.model.state_dict()) == keys
    check_equal(subject.run(subject.model), truth)
    report.undo()
    again = subject.run(subject.model)
    assert torch.equal(again[0], truth[0])
    assert all(torch.equal(again[1][name], truth[1][name]) for name in truth[1])


@pytest.mark.parametrize("name", NAMES)
def test_float32(name, make, check_float32) -> None:
    check_float32(make(name, torch.float32))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_training(name, make, check_equal) -> None:
    subject = make(name)
    truth = subject.run(subject.model.train())
    subject.accelerate(subject.model)
    graphs = []

    def recorded(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    check_equal(subject.run(torch.compile(subject.model, fullgraph=True, backend=recorded)), _renamed(truth))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_for_inference(name, make) -> None:
    subject = make(name)
    subject.model.eval()
    with torch.no_grad():
        truth = subject.features(subject.model)
        subject.accelerate(subject.model)
        torch._dynamo.reset()
        got = subject.features(torch.compile(subject.model, fullgraph=True, backend="aot_eager"))
    assert (got - truth).abs().max() <= 1e-12 * truth.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_by_inductor(name, make, check_equal) -> None:
    subject = make(name)
    for module in subject.model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # inductor draws other random numbers
    truth = subject.run(subject.model.train())
    subject.accelerate(subject.model)
    torch._dynamo.reset()
    check_equal(subject.run(torch.compile(subject.model, fullgraph=True)), _renamed(truth))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_size(name, make, check_float32) -> None:
    check_float32(make(name, torch.float32, "full"))


@pytest.mark.parametrize("name", [NAMES[0], NAMES[2], NAMES[4], NAMES[5]])
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_sixteen_bits(name, mode, make) -> None:
    """Not further from the truth than twice the original; dtypes of outputs and gradients are the original's."""
    subject = make(name, torch.bfloat16 if mode == "bfloat16" else torch.float32)
    truth = subject.run(copy.deepcopy(subject.model).double())[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        original, original_grads = subject.run(subject.model)
        subject.accelerate(subject.model)
        got, grads = subject.run(subject.model)
    assert got.dtype == original.dtype
    assert {k: g.dtype for k, g in grads.items()} == {k: g.dtype for k, g in original_grads.items()}
    assert (got.double() - truth).norm() <= 2 * (original.double() - truth).norm()


def _renamed(run):
    return run[0], {f"_orig_mod.{name}": grad for name, grad in run[1].items()}
