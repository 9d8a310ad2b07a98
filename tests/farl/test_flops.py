"""The FLOP that the MFU is measured against: those of the paper's model, and those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from farl.flops import training_flops
from farl.masking import mask_sizes
from farl.model import MODELS, FaRL, MimConfig, ModelConfig, PackedText

CAPTION = 15

# Attention on a CPU, which older versions of torch do not count by themselves.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}


def test_the_paper_model_needs_about_214_gflop_a_pair() -> None:
    """A step of ViT-B/16 at 224 px, counted apart: 3 x (two image streams less the rows that nobody reads, text of 15
    tokens, 75 masked rows through the masked branch and its head)."""
    assert training_flops(MODELS["farl-b16"], masked=75, caption_tokens=CAPTION) == pytest.approx(214e9, rel=0.01)


def counted(config: ModelConfig, masked: int) -> float:
    """FLOP a pair of forward and backward as torch's own counter sees them."""
    pairs, patches, size = 4, config.vision.num_patches, config.vision.image_size
    model = FaRL(config)
    images = torch.randint(0, 256, (pairs, size, size, 3), dtype=torch.uint8)
    starts = torch.arange(0, pairs * CAPTION + 1, CAPTION, dtype=torch.int32)
    text = PackedText(torch.randint(1, 100, (pairs * CAPTION,)), starts, CAPTION)
    branch = {}
    if config.mim is not None:
        positions = torch.arange(masked, dtype=torch.int32).expand(pairs, masked).contiguous()
        mask = (torch.arange(patches) < masked).expand(pairs, patches)
        targets = torch.randint(0, config.mim.vocab_size, (pairs, masked))
        branch = {"mask": mask, "masked_positions": positions, "targets": targets}
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        output = model(images, text, **branch)
        loss = output.image_features.sum() + output.text_features.sum()
        (loss if output.mim_loss_sum is None else loss + output.mim_loss_sum).backward()
    return counter.get_total_flops() / pairs


@pytest.mark.parametrize("mim", [None, MimConfig(layers=1, vocab_size=16), MimConfig(layers=3, vocab_size=900)])
@pytest.mark.parametrize("name", ["farl-micro", "farl-tiny"])
def test_torch_counts_the_same(name: str, mim: MimConfig | None) -> None:
    """To 3 %: torch counts five products in the backward of attention, of which one is done a second time."""
    config = replace(MODELS[name], mim=mim)
    masked, _ = mask_sizes(config.vision.grid)
    wanted = training_flops(config, masked=masked, caption_tokens=CAPTION)
    assert counted(config, masked) == pytest.approx(wanted, rel=0.03)
