"""What a run starts from: visual tokens, model and optimizer, new or from a checkpoint."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farl.config import TrainConfig
from farl.evaluation.features import spread_positions
from farl.evaluation.pair_reader import read_batches
from farl.model import MODELS, FaRL, ModelConfig, load_pretrained
from farl.model.blocks import Transformer
from farl.tokens import DalleEncoder, PatchCodebook, TokenCache, VisualTokenizer
from farl.tokens.dalle import PIXELS_PER_TOKEN
from farl_engine.data import CpuDecoder, CropPlan, FaceCropPlan, ShardIndex
from farl_engine.data.face_crop import read_face_boxes
from farl_engine.distributed import World, broadcast_object, say
from farl_engine.optim import parameter_groups
from farl_engine.sharding import load_optimizer, shard

# Images that the codebook is fitted on: 128,000 patches for 512 codes at the sizes of farl-tiny.
CODEBOOK_IMAGES = 2_000
# Positions and single vectors that decay would only pull to zero; biases and the logit scale have no second axis.
UNDECAYED = ("positional_embedding", "class_embedding", "mask_token")


def check_sources(config: TrainConfig, saved: dict[str, Any] | None) -> None:
    """What can be known to be wrong before the shards are read, which may take minutes.

    Raises:
        ValueError: there is no such --model, no such file as --init or --visual-tokens name, or --run-dir is a file.
    """
    named_sizes(config)
    if Path(config.run_dir).is_file():
        raise ValueError(f"--run-dir {config.run_dir} is a file: name a folder, which is made if absent")
    files = {"--visual-tokens": config.visual_tokens.partition(":")[2] if config.mim_weight else ""}
    # A resumed run has its weights from the checkpoint.
    files["--init"] = config.init if saved is None else ""
    files["--face-boxes"] = config.face_boxes
    for option, name in files.items():
        if name and not Path(name).exists():
            raise ValueError(f"{option} names {name}, which does not exist: mend the path")


def check_engine(config: TrainConfig, world: World) -> None:
    """Whether --engine can run here and with the other settings.

    Raises:
        ValueError: --engine graph without a GPU, with several processes or with --profile.
    """
    if config.engine != "graph":
        return
    if world.device.type != "cuda":
        raise ValueError(f"--engine graph records CUDA graphs, and this runs on {world.device}: use --engine fused")
    if world.size > 1:
        raise ValueError(f"--engine graph is for one process, and there are {world.size}: use --engine fused")
    if config.profile:
        raise ValueError("--profile shows nothing of the parts of a recorded update: use --engine fused with it")


def crop_plan(config: TrainConfig, index: ShardIndex) -> CropPlan:
    """The crops of training, which `farl.data tokenize` takes as well.

    Raises:
        ValueError: the face boxes are of other data.
    """
    scale = (config.crop_scale, 1.0)
    if not config.face_boxes:
        return CropPlan(scale=scale)
    try:
        faces = read_face_boxes(config.face_boxes)
        faces.check(index.fingerprint, len(index))
    except ValueError as error:
        raise ValueError(f"--face-boxes {config.face_boxes}: {error}") from None
    return FaceCropPlan(scale=scale, faces=faces.box)


def visual_tokenizer(
    config: TrainConfig,
    index: ShardIndex,
    world: World,
    saved: dict[str, Any] | None,
    cache: TokenCache | None = None,
) -> VisualTokenizer | None:
    """Targets of the masked branch: of the cache, the checkpoint or a file, or fitted by rank 0 on the run's own data.

    None where the masked branch is off.

    Raises:
        ValueError: the file does not fit, or there are too few images to fit a codebook on.
    """
    if config.mim_weight == 0:
        return None
    if cache is not None:
        return cache.tokenizer(world.device)
    if config.visual_tokens != "codebook":
        return load_encoder(config, config.visual_tokens.removeprefix("dalle:")).to(world.device)
    state = saved["visual_tokens"] if saved is not None else None
    if state is None:
        fitted = fit_codebook(config, index, world).state_dict() if world.is_main else None
        state = broadcast_object(world, fitted)
    return PatchCodebook.from_state_dict(state).to(world.device)


def load_encoder(config: TrainConfig, path: str) -> DalleEncoder:
    """The dVAE encoder in a file, for the patches of --model. ValueError if the file does not fit."""
    rows, _ = named_sizes(config).vision.grid
    return DalleEncoder.from_file(path, token_image_size=PIXELS_PER_TOKEN * rows)


def fit_codebook(config: TrainConfig, index: ShardIndex, world: World) -> PatchCodebook:
    """A codebook of the model's number of visual tokens from images at equal distances in the run's data.

    Raises:
        ValueError: the readable ones among them have fewer patches than there are visual tokens.
    """
    sizes = named_sizes(config)
    assert sizes.mim is not None
    vocab_size = sizes.mim.vocab_size
    say(world, f"fitting {vocab_size:,} visual tokens on the run's own patches")
    decoder = CpuDecoder(sizes.vision.image_size)
    with read_batches(index, [spread_positions(len(index), CODEBOOK_IMAGES)], decoder) as batches:
        images = next(batches).images
    patches = len(images) * sizes.vision.num_patches
    if patches < vocab_size:
        raise ValueError(
            f"{len(images)} readable images in --data have {patches} patches, fewer than {config.model} has visual "
            f"tokens ({vocab_size}): give more images, a smaller --model, or --mim-weight 0"
        )
    # The codes are the same on every device, and thousands of them take long on a CPU.
    images = images.to(world.device)
    fitted = PatchCodebook.fit(images, patch_size=sizes.vision.patch_size, vocab_size=vocab_size, seed=config.seed)
    return fitted.to("cpu")


def build_model(config: TrainConfig, tokenizer: VisualTokenizer | None, saved: dict[str, Any] | None) -> FaRL:
    """The model of the checkpoint, of --init, or a new one drawn from --seed; the same on every rank.

    With --contrastive-weight 0, what only the contrastive loss trains takes no gradient.

    Of an --init file with the masked branch its blocks are kept. The head is kept if it says DALL-E's tokens as those
    of --visual-tokens: a codebook is fitted anew for each run, and another one's head would start from wrong answers.

    Raises:
        ValueError: --init cannot be read as weights, or holds other sizes than --model.
    """
    model = _model_with_weights(config, tokenizer, saved)
    if config.contrastive_weight == 0:
        model.train_masked_branch_alone()
    return model


def _model_with_weights(config: TrainConfig, tokenizer: VisualTokenizer | None, saved: dict[str, Any] | None) -> FaRL:
    if saved is not None:
        model = FaRL(ModelConfig.from_dict(saved["model_config"]))
        model.load_state_dict(saved["model"])
        return model
    sizes = with_tokens(named_sizes(config), tokenizer)
    torch.manual_seed(config.seed)
    if not config.init:
        return FaRL(sizes)
    given = load_pretrained(config.init)
    if not same_towers(given.config, sizes):
        fitting = next((name for name, other in MODELS.items() if same_towers(given.config, other)), None)
        advice = f"use --model {fitting}" if fitting else f"it fits none of {', '.join(MODELS)}"
        raise ValueError(f"--init {config.init} holds other sizes than --model {config.model}: {advice}")
    model = FaRL(replace(given.config, mim=sizes.mim))
    drawn = model.state_dict()
    # What the file lacks, or has in another size, stays as drawn: the masked branch and its head.
    kept = {name: value for name, value in given.state_dict().items() if _fits(drawn.get(name), value)}
    if config.visual_tokens == "codebook" or isinstance(tokenizer, PatchCodebook):
        kept = {name: value for name, value in kept.items() if not name.startswith("visual.lm_head.")}
    model.load_state_dict(drawn | kept)
    return model


def share_out(model: FaRL, world: World) -> None:
    """Share `model`, on the CPU and the same on every rank, out over the processes, and move it to the device.

    Block by block but for the last one of each stack, which is computed by rows, in the trunk twice a step; it stays
    with what belongs to no block. Vectors and what else AdamW does not decay stay whole, so that a parameter group
    holds either whole parameters or shared ones, as the fused AdamW needs them.
    """
    shard(model, list(_shared_blocks(model)), keep=_stays_whole, world=world)


@functools.cache
def without_storage(sizes: ModelConfig, *, contrast: bool = True) -> FaRL:
    """A model of which only names and shapes are there; its parameters want gradients as those of a run do."""
    with torch.device("meta"):
        model = FaRL(sizes)
    if not contrast:
        model.train_masked_branch_alone()
    return model


def shared_groups(model: FaRL) -> dict[str, list[Tensor]]:
    """Parameters that `share_out` has gathered together: by the block's name, or "" for those of none.

    "whole": those that are not shared out.
    """
    blocks = {block: name for name, block in model.named_modules() if block in _shared_blocks(model)}
    names = {id(p): name for block, name in blocks.items() for p in block.parameters()}
    groups: dict[str, list[Tensor]] = {"whole": [], "": []} | {name: [] for name in blocks.values()}
    for name, parameter in model.named_parameters():
        groups["whole" if _stays_whole(name, parameter) else names.get(id(parameter), "")].append(parameter)
    return groups


def part_of(parameters: list[Tensor], processes: int) -> int:
    """How many numbers of `parameters`, shared out by rows, the first process holds: as many as any."""
    return sum(-(-len(p) // processes) * p[0].numel() for p in parameters)


def _shared_blocks(model: FaRL) -> set[nn.Module]:
    stacks = [module for module in model.modules() if isinstance(module, Transformer)]
    return {block for stack in stacks for block in stack.resblocks[:-1]}


def _stays_whole(name: str, parameter: Tensor) -> bool:
    return parameter.ndim < 2 or name.endswith(UNDECAYED)


def build_optimizer(config: TrainConfig, model: FaRL, saved: dict[str, Any] | None) -> torch.optim.AdamW:
    """AdamW that heeds the loop's non-finite flag, with the moments of the checkpoint if there is one."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, no_decay=lambda name, _: name.endswith(UNDECAYED)),
        lr=config.lr,
        betas=(0.9, config.beta2),
        eps=1e-6,
        fused=True,
    )
    if saved is not None:
        load_optimizer(optimizer, saved["optimizer"])
    return optimizer


def named_sizes(config: TrainConfig) -> ModelConfig:
    """The sizes that --model names. ValueError if it names none."""
    if config.model not in MODELS:
        raise ValueError(f"--model is {config.model!r}; use one of {', '.join(MODELS)}")
    return MODELS[config.model]


def same_towers(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether weights of one can start the other; the masked branch, activation and LayerNorm's casts may differ."""
    return (one.vision, one.text, one.embed_dim) == (other.vision, other.text, other.embed_dim)


def with_tokens(sizes: ModelConfig, tokenizer: VisualTokenizer | None) -> ModelConfig:
    """`sizes` with a masked branch for `tokenizer`'s vocabulary, or without one."""
    if tokenizer is None:
        return replace(sizes, mim=None)
    assert sizes.mim is not None
    return replace(sizes, mim=replace(sizes.mim, vocab_size=tokenizer.vocab_size))


def _fits(drawn: torch.Tensor | None, value: torch.Tensor) -> bool:
    return drawn is not None and drawn.shape == value.shape
