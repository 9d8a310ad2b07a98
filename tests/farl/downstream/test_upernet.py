"""Neck and head against transformers' UperNetHead, at odd sizes, and BatchNorm over processes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from farl.downstream.backbone import Features
from farl.downstream.upernet import BatchNorm, DenseHead, Neck, UPerHead


def reference_head(channels_in: list[int], channels: int, outputs: int) -> nn.Module:
    config = pytest.importorskip("transformers").UperNetConfig(hidden_size=channels, num_labels=outputs)
    from transformers.models.upernet.modeling_upernet import UperNetHead

    return UperNetHead(config, channels_in)


def shake(module: nn.Module) -> None:
    """Weights and running statistics away from what they start with."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            noise = torch.randn_like(value) * 0.1
            value.data.copy_(noise.abs() + 0.5 if name.endswith("var") else noise)


def test_outputs_are_those_of_transformers_with_the_same_weights() -> None:
    torch.manual_seed(0)
    reference = reference_head([12, 12, 10, 8], 16, 5)
    shake(reference)
    head = UPerHead([12, 12, 10, 8], 16, 5)
    head.load_state_dict(reference.state_dict())
    maps = [torch.randn(2, c, s, s + 1) for c, s in ((12, 20), (12, 10), (10, 5), (8, 3))]
    torch.testing.assert_close(head.eval()(maps), reference.eval()(maps))
    head.dropout.p = 0.0
    torch.testing.assert_close(head.train()(maps), reference.train()(maps), atol=1e-5, rtol=1e-4)


def test_as_many_parameters_as_transformers_at_768_channels() -> None:
    with torch.device("meta"):
        reference = reference_head([768] * 4, 768, 11)
        ours = UPerHead([768] * 4, 768, 11)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


def test_dropout_is_of_whole_channels_and_before_the_classifier() -> None:
    head = UPerHead([4] * 4, 8, 3, dropout=0.5).train()
    seen = []
    head.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head([torch.randn(4, 4, s, s) for s in (8, 4, 2, 1)])
    whole = (seen[0] == 0).flatten(2).all(2)
    assert 0.2 < whole.float().mean() < 0.9


@pytest.mark.parametrize(("patch", "sizes"), [(16, (28, 14, 7, 4)), (14, (28, 14, 7, 4)), (8, (14, 7, 4, 2))])
def test_sizes_of_the_pyramid(patch: int, sizes: tuple[int, ...]) -> None:
    neck = Neck(6, patch)
    assert tuple(x.shape[-1] for x in neck([torch.randn(2, 6, 7, 7)] * 4)) == sizes
    assert neck.stride == patch * 7 / sizes[0]
    with pytest.raises(ValueError, match="4 blocks, not 2"):
        neck([torch.randn(2, 6, 7, 7)] * 2)


def test_the_neck_is_beits() -> None:
    """deconv + norm + GELU + deconv; deconv; nothing; max-pooling: from each its own map."""
    torch.manual_seed(1)
    neck = Neck(4, 16).eval()
    shake(neck)
    maps = [torch.randn(1, 4, 6, 6) for _ in range(4)]
    found = neck(maps)

    def deconv(x: Tensor, layer: nn.Module) -> Tensor:
        blocks = torch.einsum("bchw,cdij->bdhiwj", x, layer.weight)
        return blocks.flatten(4, 5).flatten(2, 3) + layer.bias[:, None, None]

    first, norm, _, second = neck.levels[0]
    x = deconv(maps[0], first)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(found[0], deconv(x, second))
    torch.testing.assert_close(found[1], deconv(maps[1], neck.levels[1]))
    assert found[2] is maps[2]
    torch.testing.assert_close(found[3], maps[3].unflatten(3, (3, 2)).unflatten(2, (3, 2)).amax((3, 5)))


@pytest.mark.parametrize(("patch", "grid"), [(16, 1), (16, 3), (16, 6), (8, 1), (8, 5), (8, 12)])
def test_any_grid_trains(patch: int, grid: int) -> None:
    head = DenseHead(8, patch, 5, channels=8).train()
    maps = [torch.randn(2, 8, grid, grid) for _ in range(4)]
    out = head(Features(maps, [torch.randn(2, 8)] * 4))
    assert out.shape == (2, 5, *[int(grid * patch / head.stride)] * 2)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_batch_norm_alone_is_torchs() -> None:
    ours, torchs = BatchNorm(5), nn.BatchNorm2d(5)
    x = torch.randn(3, 5, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def _half_a_batch(rank: int, rendezvous: str, module: nn.Module, x: Tensor, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    module = copy.deepcopy(module)  # what is handed over lies in memory that both share
    part = (x[:2], x[2:])[rank].clone().requires_grad_()
    out = module.train()(part)
    (out * out.detach().cos()).sum().backward()
    grads = [p.grad for p in module.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    torch.save((out.detach(), part.grad, grads, module.state_dict()), f"{result}{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = BatchNorm(4)
    shake(module)
    x = torch.randn(3, 4, 5, 5)  # 2 images here, 1 there
    result = str(tmp_path / "result")
    mp.spawn(_half_a_batch, (str(tmp_path / "meet"), module, x, result), nprocs=2)
    alone = x.clone().requires_grad_()
    out = module.train()(alone)
    (out * out.detach().cos()).sum().backward()
    parts = [torch.load(f"{result}{rank}") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), alone.grad, atol=1e-5, rtol=1e-4)
    for part in parts:
        torch.testing.assert_close(part[2], [p.grad for p in module.parameters()], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part[3], module.state_dict())
