"""The FLOP that the MFU is measured against are those that a running step takes, and each elimination shows in them.

A step runs here in two ways: on the CPU, and by the fused ops on tensors without storage, which count by their own
formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from farl.flops import count_flops, eliminated_flops, encoder_flops, training_flops
from farl.masking import mask_sizes
from farl.model import MODELS, FaRL, MimConfig, ModelConfig
from farl.model.blocks import Block
from farl.model.mim import MaskedVisionTower
from farl.tokens import DalleEncoder
from farl_kernels import use_backend
from tests.support.steps import step_on_blanks

CAPTION = 15
PAIRS = 2
CPU, WITHOUT_STORAGE = torch.device("cpu"), torch.device("meta")


def masked_of(config: ModelConfig) -> int:
    return mask_sizes(config.vision.grid)[0]


def wanted(config: ModelConfig, caption_tokens: int = CAPTION, contrast: bool = True) -> float:
    return PAIRS * training_flops(
        config,
        masked=masked_of(config),
        caption_tokens=caption_tokens,
        contrast=contrast,
        global_batch=PAIRS if contrast else 0,
    )


def counted(
    config: ModelConfig,
    device: torch.device = WITHOUT_STORAGE,
    *,
    caption: int = CAPTION,
    contrast: bool = True,
    change: Callable[[FaRL], object] | None = None,
) -> int:
    """FLOP of a whole step of `PAIRS` pairs; `change` is done to its model before."""
    step, _, batch = step_on_blanks(config, device, PAIRS, caption=caption, contrast=contrast, change=change)
    with use_backend("triton" if device.type == "meta" else None):
        return count_flops(lambda: step(batch))


def test_the_paper_model_needs_about_214_gflop_a_pair() -> None:
    """A step of ViT-B/16 at 224 px, counted apart: 3 x (two image streams less the rows that nobody reads, text of 15
    tokens, 75 masked rows through the masked branch and its head)."""
    assert training_flops(MODELS["farl-b16"], masked=75, caption_tokens=CAPTION) == pytest.approx(214e9, rel=0.01)


@pytest.mark.parametrize("mim", [None, MimConfig(layers=1, vocab_size=16), MimConfig(layers=3, vocab_size=900)])
@pytest.mark.parametrize("name", ["farl-micro", "farl-b16"])
def test_a_step_of_the_fused_ops_takes_what_the_model_of_it_says(name: str, mim: MimConfig | None) -> None:
    config = replace(MODELS[name], mim=mim)
    assert counted(config) == wanted(config)


def test_other_sizes_of_the_mlps_count() -> None:
    config = MODELS["farl-micro"]
    config = replace(config, vision=replace(config.vision, mlp_ratio=3.0), text=replace(config.text, mlp_ratio=1.5))
    assert counted(config) == wanted(config)


def test_the_masked_branch_alone() -> None:
    config = MODELS["farl-tiny"]
    assert counted(config, contrast=False) == wanted(config, contrast=False) < 0.6 * wanted(config)


@pytest.mark.parametrize("name", ["farl-micro", pytest.param("farl-s16", marks=pytest.mark.slow)])
def test_a_step_on_the_cpu_takes_what_the_model_of_it_says(name: str) -> None:
    assert counted(MODELS[name], CPU) == pytest.approx(wanted(MODELS[name]), rel=0.01)


def every_row(block: Block) -> None:
    """Make `block` compute all rows and throw away those that are not asked for."""
    block.at_rows = lambda stream, take, packing=None: block(  # type: ignore[method-assign]
        stream, causal=packing is not None, packing=packing
    ).rows(take)


def every_row_in_the_head(model: FaRL) -> None:
    visual = model.visual
    assert isinstance(visual, MaskedVisionTower)
    loss = visual.token_loss
    rest = PAIRS * (model.config.vision.num_patches - masked_of(model.config))
    visual.token_loss = lambda hidden, targets: loss(  # type: ignore[method-assign]
        F.pad(hidden, (0, 0, 0, rest)), F.pad(targets.flatten(), (0, rest), value=-1)
    )


def patches_embedded_twice(model: FaRL) -> None:
    embed = model.visual.embed_patches
    model.visual.embed_patches = lambda images: embed(images) + embed(images)  # type: ignore[method-assign]


WITHOUT: dict[str, Callable[[FaRL], object]] = {
    "last text block: end-of-text row only": lambda model: every_row(model.transformer.last),
    "last image block: class token only": lambda model: every_row(model.visual.transformer.last),
    "last masked block: masked rows only": lambda model: every_row(model.visual.lm_transformer.last),
    "head of visual tokens: masked rows only": every_row_in_the_head,
    "patches embedded once for both streams": patches_embedded_twice,
}


@pytest.mark.parametrize("name", ["farl-micro", "farl-b16"])
def test_each_elimination_shows_in_the_count(name: str) -> None:
    config = MODELS[name]
    saved = eliminated_flops(config, masked=masked_of(config), caption_tokens=CAPTION)
    needed = counted(config)
    more = {what: counted(config, change=change) - needed for what, change in WITHOUT.items()}
    more["captions without padding"] = counted(config, caption=config.text.context_length) - needed
    assert more == {what: PAIRS * flops for what, flops in saved.items()}
    assert all(flops > 0 for flops in more.values())


def test_what_is_computed_again_counts_again() -> None:
    config = MODELS["farl-micro"]

    def recompute(model: FaRL) -> None:
        model.checkpoint_activations = True

    assert 1.2 < counted(config, change=recompute) / wanted(config) < 1.34


@pytest.mark.parametrize("keys", [None, 40])
def test_formulas_of_the_fused_ops_are_those_of_the_plain_ones(keys: int | None) -> None:
    """The raw attention ops beside plain products: Q heads, queries, keys and width all differ."""
    b, h, m, d = 2, 3, 24, 16
    with WITHOUT_STORAGE:
        if keys is None:
            qkv = torch.zeros(b, m, 3, h, d)
            fused = count_flops(lambda: torch.ops.farl_kernels.attention_qkv_forward(qkv, None, None, False, 1.0, "x"))
        else:
            q, k = torch.zeros(b, m, h, d), torch.zeros(b, keys, h, d)
            fused = count_flops(lambda: torch.ops.farl_kernels.attention_forward(q, k, k, None, False, 1.0, "x"))
        q, k = torch.zeros(b * h, m, d), torch.zeros(b * h, keys or m, d)
        plain = count_flops(lambda: (q @ k.mT) @ k)
    assert fused == plain


@pytest.mark.parametrize("masked", [3, 75])
@pytest.mark.parametrize(
    "sizes", [{}, {"image_size": 56, "vocab_size": 30, "hidden": 8, "blocks_per_group": 3}], ids=["released", "small"]
)
def test_an_encoder_of_visual_tokens_takes_what_the_model_of_it_says(sizes: dict[str, int], masked: int) -> None:
    names = {"image_size": "token_image_size"}
    # Autocast, which the encoder turns off, knows no device "meta".
    with FakeTensorMode():
        encoder = DalleEncoder(**{names.get(name, name): value for name, value in sizes.items()})
        images = torch.zeros(PAIRS, encoder.token_image_size, encoder.token_image_size, 3, dtype=torch.uint8)
        positions = torch.zeros(PAIRS, masked, dtype=torch.int32)
        counted = count_flops(lambda: encoder(images, positions))
    assert counted == PAIRS * encoder_flops(masked=masked, **sizes)
