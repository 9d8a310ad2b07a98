"""The report of a run: runs the model on a few held-out pairs and draws everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farl.masking import MASK_RATIO, mask_sizes
from farl.report.curves import draw_curves, read_metrics
from farl.report.page import write_page
from farl.report.patches import draw_masked_patches
from farl.report.retrieval import draw_caption_queries, draw_image_queries
from farl.tokens import VisualTokenizer

MASKED_ROWS = 5
# Enough that a right first answer means something, few enough to decode in a second.
REPORT_PAIRS = 400


def write_report(
    run_dir: str | Path,
    model: Any = None,
    images: Tensor | None = None,
    captions: Sequence[str] | None = None,
    *,
    text_tokenizer: Callable[[list[str]], Any] | None = None,
    visual_tokenizer: VisualTokenizer | None = None,
    token_images: Tensor | None = None,
    mask_ratio: float = MASK_RATIO,
    seed: int = 0,
    batch_size: int = 64,
) -> Path:
    """Write RUN_DIR/report/: index.html and its pictures, of which those whose material is not given stay as they are.

    Args:
        run_dir: a folder with metrics.jsonl and config.json (either may be missing).
        model: a `FaRL` (not wrapped in DDP) on any device; None redraws curves and page alone.
        images: uint8 [N, S, S, 3], held-out; captions: their N captions. Some hundreds make a fair retrieval picture.
        text_tokenizer: captions -> `PackedText`; None takes `farl.tokenizer.pack`.
        visual_tokenizer: the run's visual tokens, drawn as pixels if it has `decode`; None leaves the picture of the
            masked branch out.
        token_images: uint8 [N, T, T, 3], where the tokenizer wants a size of its own.
        mask_ratio: largest share of patches to mask, as in training.

    Returns:
        The path of the page.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    training, evaluation = read_metrics(run_dir / "metrics.jsonl")
    config = _read_config(run_dir / "config.json")
    global_batch = config.get("global_batch")
    draw_curves(
        training,
        evaluation,
        folder / "curves.png",
        global_batch=global_batch if isinstance(global_batch, int) and global_batch > 1 else None,
    )
    if model is not None and images is not None and captions is not None and len(images):
        was_training = model.training
        model.eval()
        try:
            # --contrastive-weight 0 leaves the text tower at random.
            if config.get("contrastive_weight", 1.0):
                _draw_retrieval(folder, model, images, captions, text_tokenizer, batch_size)
            if visual_tokenizer is not None and model.config.mim is not None:
                _draw_patches(folder, model, images, visual_tokenizer, token_images, mask_ratio, seed)
        finally:
            model.train(was_training)
    return write_page(
        folder / "index.html",
        title=run_dir.resolve().name,
        training=training,
        evaluation=evaluation,
        config=config,
    )


def report_run(
    run_dir: str | Path,
    model: Any,
    index: Any,
    decoder: Any,
    visual_tokenizer: VisualTokenizer | None = None,
    *,
    mask_ratio: float = MASK_RATIO,
    seed: int = 0,
    max_pairs: int = REPORT_PAIRS,
    threads: int = 2,
) -> Path:
    """`write_report` with pairs of a `ShardIndex` at equal distances, decoded by a `CpuDecoder`.

    Returns:
        The path of the page.
    """
    from farl.evaluation.features import spread_positions
    from farl.evaluation.pair_reader import read_batches

    with read_batches(index, [spread_positions(len(index), max_pairs)], decoder, threads=threads) as batches:
        batch = next(batches)
    return write_report(
        run_dir,
        model,
        batch.images,
        batch.captions,
        visual_tokenizer=visual_tokenizer,
        token_images=batch.token_images,
        mask_ratio=mask_ratio,
        seed=seed,
    )


@torch.no_grad()
def _draw_retrieval(
    folder: Path,
    model: Any,
    images: Tensor,
    captions: Sequence[str],
    text_tokenizer: Callable[[list[str]], Any] | None,
    batch_size: int,
) -> None:
    from farl.evaluation.features import encode_captions

    if text_tokenizer is None:
        from farl.tokenizer import pack as text_tokenizer
    device = model.logit_scale.device
    image_features = torch.cat([model.encode_image(part.to(device)).float().cpu() for part in images.split(batch_size)])
    text_features = encode_captions(model, captions, text_tokenizer, device=device, batch_size=batch_size)
    draw_caption_queries(images, captions, image_features, text_features, folder / "caption_to_images.png")
    draw_image_queries(images, captions, image_features, text_features, folder / "image_to_captions.png")


@torch.no_grad()
def _draw_patches(
    folder: Path,
    model: Any,
    images: Tensor,
    visual_tokenizer: VisualTokenizer,
    token_images: Tensor | None,
    mask_ratio: float,
    seed: int,
) -> None:
    count = min(MASKED_ROWS, len(images))
    chosen = (torch.arange(count) * 2 + 1) * len(images) // (2 * count)
    device = model.logit_scale.device
    shown = images[chosen]
    source = shown if token_images is None else token_images[chosen]
    targets = visual_tokenizer(source.to(device)).cpu()
    mask, predictions = predict_tokens(model, shown.to(device), mask_ratio=mask_ratio, seed=seed, sample_ids=chosen)
    draw_masked_patches(
        shown,
        mask,
        targets,
        predictions,
        folder / "masked_patches.png",
        grid=model.config.vision.grid,
        decode=getattr(visual_tokenizer, "decode", None),
    )


@torch.no_grad()
def predict_tokens(
    model: Any, images: Tensor, *, mask_ratio: float = MASK_RATIO, seed: int = 0, sample_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask images block-wise as in training and predict their visual tokens.

    Args:
        model: a `FaRL` with the masked branch; images: uint8 [n, H, W, 3] on its device.
        mask_ratio: largest share of patches to mask.

    Returns:
        bool [n, P] and int64 [n, P] (-1 where not masked), both on the CPU.
    """
    from farl_kernels.patch_masking import sample_block_masks

    grid = model.config.vision.grid
    max_masked, min_block = mask_sizes(grid, mask_ratio)
    ids = torch.arange(len(images)) if sample_ids is None else sample_ids
    mask, positions = sample_block_masks(
        ids.to(images.device),
        torch.zeros(len(images), dtype=torch.int64, device=images.device),
        grid=grid,
        max_masked=max_masked,
        min_block=min_block,
        seed=seed,
    )
    _, hidden = model.visual.forward_masked(images, mask, positions)
    tokens = model.visual.lm_head(hidden).argmax(-1).view(positions.shape).cpu()
    mask, positions = mask.cpu(), positions.cpu().long()
    predictions = torch.full(mask.shape, -1, dtype=torch.int64)
    rows, columns = (positions >= 0).nonzero(as_tuple=True)
    predictions[rows, positions[rows, columns]] = tokens[rows, columns]
    return mask, predictions


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
