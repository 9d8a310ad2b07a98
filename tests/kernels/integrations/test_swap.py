"""What `accelerate` promises besides equal results: keys, copies, hooks, undoing, reports, errors."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from farl_kernels.integrations import restore
from farl_kernels.integrations.swap import Fused

VIT, EVA, OPEN_CLIP, CLIP = (
    "timm vit_base_patch16_224",
    "timm eva02_base_patch16_clip_224",
    "open_clip ViT-B-16",
    "transformers CLIP",
)


def test_import_needs_no_library() -> None:
    """The package and its integrations import without the libraries; accelerate then says what it wants."""
    code = """
import importlib, sys
for name in ("timm", "open_clip", "transformers"):
    sys.modules[name] = None  # as if not installed
import torch, farl_kernels
for name in ("timm", "open_clip", "transformers"):
    try:
        importlib.import_module(f"farl_kernels.integrations.{name}").accelerate(torch.nn.Linear(2, 2))
    except ValueError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    wanted = [f"accelerate: model is a Linear without {name} modules" for name in ("timm", "open_clip", "transformers")]
    assert [line[: len(want)] for line, want in zip(out.splitlines(), wanted, strict=True)] == wanted


@pytest.mark.parametrize("name", [VIT, OPEN_CLIP, CLIP])
def test_copies(name, make) -> None:
    """deepcopy, pickle and state dicts of an accelerated model give the same outputs and can be undone."""
    subject = make(name)
    original = {key: type(module) for key, module in subject.model.named_modules()}
    before = subject.run(subject.model)[0]
    subject.accelerate(subject.model)
    want = subject.run(subject.model)[0]
    buffer = io.BytesIO()
    torch.save(subject.model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(subject.model),
        pickle.loads(pickle.dumps(subject.model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert any(isinstance(module, Fused) for module in other.modules())
        assert torch.equal(subject.run(other)[0], want)
        # Copies keep no tie to the model that they were made of.
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(subject.run(subject.model)[0], want)
    fresh = make(name)
    fresh.model.load_state_dict(subject.model.state_dict())
    assert torch.equal(fresh.run(fresh.model)[0], before)
    undo = sys.modules[subject.accelerate.__module__].restore
    assert undo(copies[0]) > 0
    assert {key: type(module) for key, module in copies[0].named_modules()} == original


def test_pickles_load_in_another_process(make, tmp_path) -> None:
    """The classes are made when a pickle asks for them."""
    outputs = {}
    for index, name in enumerate([VIT, OPEN_CLIP, CLIP]):
        subject = make(name)
        subject.accelerate(subject.model.eval())
        inputs = {key: x.double() if x.is_floating_point() else x for key, x in subject.inputs.items()}
        torch.save((subject.model, inputs), tmp_path / f"{index}.pt")
        outputs[index] = subject.features(subject.model).detach()
    code = """
import sys, torch
for index in range(3):
    model, inputs = torch.load(f"{sys.argv[1]}/{index}.pt", weights_only=False)
    torch.save(model(**inputs), f"{sys.argv[1]}/out{index}.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for index, want in outputs.items():
        out = torch.load(tmp_path / f"out{index}.pt", weights_only=False)
        first = out if isinstance(out, torch.Tensor) else out["text_embeds"] if isinstance(out, dict) else out[0]
        scale = want[: first.numel()].norm() / first.norm()
        assert torch.allclose(first.flatten() * scale, want[: first.numel()], rtol=1e-12)


def test_undo_leaves_nothing_behind(make) -> None:
    for name in (VIT, OPEN_CLIP, CLIP):
        subject = make(name)
        before = {key: sorted(module.__dict__) for key, module in subject.model.named_modules()}
        report = subject.accelerate(subject.model, backend="reference")
        assert report.undo() == len(report.replaced)
        assert report.undo() == 0
        assert {key: sorted(module.__dict__) for key, module in subject.model.named_modules()} == before


def test_names_and_types_stay(make) -> None:
    """Wrapping policies look for classes by name or by isinstance."""
    subject = make(OPEN_CLIP)
    before = str(subject.model)
    classes = {key: type(module) for key, module in subject.model.named_modules()}
    subject.accelerate(subject.model)
    assert str(subject.model) == before
    assert all(isinstance(module, classes[key]) for key, module in subject.model.named_modules())


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        (VIT, "blocks.0.attn.qkv"),
        (VIT, "blocks.0.attn.proj"),
        (VIT, "blocks.0.attn"),
        (VIT, "blocks.0.norm2"),
        (VIT, "blocks.0.mlp.fc1"),
        (VIT, "blocks.0.mlp.act"),
        (EVA, "blocks.0.attn.proj"),
        (OPEN_CLIP, "visual.transformer.resblocks.0.attn"),
        (OPEN_CLIP, "visual.transformer.resblocks.0.ln_2"),
        (OPEN_CLIP, "transformer.resblocks.0.mlp.c_fc"),
        (CLIP, "vision_model.encoder.layers.0.layer_norm2"),
    ],
)
def test_hooks_still_run(name, inner, make) -> None:
    """A module that has hooks is called, and what the hook returns counts."""
    subject = make(name)
    subject.accelerate(subject.model)
    plain = subject.run(subject.model)[0]
    calls = []

    def double(module, args, output):
        calls.append(module)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    subject.model.get_submodule(inner).register_forward_hook(double)
    accelerated = subject.run(subject.model)[0]
    assert len(calls) == 1
    assert not torch.allclose(accelerated, plain)
    restore(subject.model)
    want = subject.run(subject.model)[0]
    assert (accelerated - want).abs().max() <= 1e-12 * want.abs().max()


def test_adapters_on_inner_layers_count(make) -> None:
    """A layer replaced after `accelerate` (LoRA, quantisation) is called."""

    class Adapter(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 1.5 * self.inner(x)

    subject = make(VIT)
    subject.accelerate(subject.model)
    for block in subject.model.blocks:
        block.attn.qkv, block.attn.proj = Adapter(block.attn.qkv), Adapter(block.attn.proj)
        block.mlp.fc1 = Adapter(block.mlp.fc1)
    got = subject.run(subject.model)[0]
    restore(subject.model)
    want = subject.run(subject.model)[0]
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_a_patched_forward_is_left(make) -> None:
    subject = make(VIT)
    attention = subject.model.blocks[0].attn
    attention.forward = lambda x, **options: x
    report = subject.accelerate(subject.model)
    assert type(attention).__module__.startswith("timm")
    assert [x.name for x in report.left if "patched" in x.reason] == ["blocks.0.attn"]


def test_a_forward_with_other_arguments_is_left(make, monkeypatch) -> None:
    import timm

    subject = make(VIT)
    monkeypatch.setattr(timm.layers.Attention, "forward", lambda self, x, attn_mask, temperature: x)
    report = subject.accelerate(subject.model)
    assert [x.name for x in report.left if "other arguments" in x.reason] == ["blocks.0.attn", "blocks.1.attn"]


def test_a_second_call_changes_nothing(make) -> None:
    subject = make(VIT)
    first = subject.accelerate(subject.model)
    second = subject.accelerate(subject.model)
    assert not second.replaced and f"{len(first.replaced)} modules ran fused ops before" in str(second)
    assert second.undo() == len(first.replaced)


def test_backend_reaches_every_op(make) -> None:
    """Ops refuse a backend that they do not have: "sdpa" serves attention, and the norms say that it is not theirs."""
    subject = make(VIT)
    truth = subject.run(subject.model)[0]
    report = subject.accelerate(subject.model, backend="reference")
    got = subject.run(subject.model)[0]
    assert (got - truth).abs().max() <= 1e-12 * truth.abs().max()
    report.undo()
    subject.accelerate(subject.model, backend="sdpa")
    with pytest.raises(ValueError, match="add_layer_norm: backend 'sdpa' is not one of"):
        subject.run(subject.model)
    with pytest.raises(ValueError, match="'cuda' is the backend of no op"):
        subject.accelerate(subject.model, backend="cuda")


@pytest.mark.parametrize("name", [OPEN_CLIP, CLIP])
def test_the_other_library_is_named(name, make) -> None:
    from farl_kernels.integrations import timm

    with pytest.raises(ValueError, match=f"use farl_kernels.integrations.{name.split()[0]}") as caught:
        timm.accelerate(make(name).model)
    assert len(str(caught.value).splitlines()) == 1


def test_not_a_model() -> None:
    from farl_kernels.integrations import open_clip

    with pytest.raises(ValueError, match=r"model is a str, want a model of open_clip such as open_clip\.create_model"):
        open_clip.accelerate("ViT-B-16")  # type: ignore[arg-type]


def test_report_reads_well(make) -> None:
    subject = make(EVA)
    text = str(subject.accelerate(subject.model))
    assert text.splitlines()[0] == "accelerate (timm Eva): 13 modules run fused ops, 2 run as before"
    assert "2 x EvaAttention -> masked_attention after the rotary embedding  (blocks.0.attn, blocks.1.attn)" in text
    assert "2 x SwiGLU: there is no fused gated MLP  (blocks.0.mlp, blocks.1.mlp)" in text


def test_fully_shard(make, tmp_path) -> None:
    """FSDP2 derives its class from ours: the results stay, and undoing waits for FSDP."""
    from torch.distributed.fsdp import fully_shard

    subject = make(VIT)
    truth = subject.run(subject.model)
    subject.accelerate(subject.model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for block in subject.model.blocks:
            fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        fully_shard(subject.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        features, grads = subject.run(subject.model)
        assert (features - truth[0]).abs().max() <= 1e-12 * truth[0].abs().max()
        for name, grad in grads.items():
            error = (grad.full_tensor() - truth[1][name]).abs().max()
            assert error <= 1e-12 * max(g.abs().max() for g in truth[1].values())
        with pytest.raises(ValueError, match=r"restore: blocks\.0 is a FSDP"):
            restore(subject.model)
    finally:
        torch.distributed.destroy_process_group()
