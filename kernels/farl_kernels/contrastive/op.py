"""The public contrastive loss: arguments checked, backend chosen, rows reduced."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from farl_kernels import launch
from farl_kernels.checks import check_choice, check_device, describe
from farl_kernels.contrastive.autograd import loss_of_pairs
from farl_kernels.contrastive.exchange import GatheredFeatures, Ranks
from farl_kernels.contrastive.options import OP, PRECISIONS, REDUCTIONS, Options
from farl_kernels.dispatch import Op

CONTRASTIVE_LOSS = Op(OP)
CONTRASTIVE_LOSS.register(
    "triton",
    functools.partial(loss_of_pairs, backend="triton"),
    lambda image, *rest: launch.refuses(image),
    lambda image, *rest: launch.declines(image),
)
CONTRASTIVE_LOSS.register("reference", functools.partial(loss_of_pairs, backend="reference"))


def _features(name: str, features: Tensor, precision: str | None) -> Tensor:
    """`features` in the dtype of the computation."""
    if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(f"{OP}: {name} is {describe(features)}, want a floating-point tensor [n, D] with n >= 1")
    if precision is None:
        return features
    check_choice(OP, "precision", precision, PRECISIONS)
    return features.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def gather_features(
    text_features: Tensor, *, group: dist.ProcessGroup | None = None, precision: str | None = None
) -> GatheredFeatures:
    """Start the all-gather of the text features; give the result to :func:`contrastive_loss` in their place.

    Called before the image tower runs, the gather hides under the image tower's forward pass, and the reduce-scatter
    of the text gradient under its backward pass. All ranks of the group call it, in the same order as their other
    collectives. Without several ranks nothing is sent.

    Args:
        text_features: float [n, D], the same n and D on all ranks.
        group: the ranks that share the loss; None is the default group, or one process where none is initialised.
        precision: dtype in which features travel and products are taken: None (that of the features), "bf16", "tf32"
            or "fp32". The last two keep float32, and say how it is multiplied on a GPU; None leaves that to
            ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: an argument does not fit, or n, D or the dtype differ between ranks (then on every rank; on GPUs
            after the first step, on those ranks whose shape is new).
    """
    return _gathered(_features("text_features", text_features, precision), Ranks(group))


def local_features(text_features: Tensor, precision: str | None = None) -> GatheredFeatures:
    """As :func:`gather_features` in this process by itself, whatever groups there are."""
    return GatheredFeatures(_features("text_features", text_features, precision), Ranks.alone())


def _gathered(features: Tensor, ranks: Ranks) -> GatheredFeatures:
    return GatheredFeatures(features, ranks) if ranks.world_size == 1 else _start_gather(features, ranks)


@torch.compiler.disable
def _start_gather(features: Tensor, ranks: Ranks) -> GatheredFeatures:
    return GatheredFeatures(features, ranks)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor | GatheredFeatures,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    kind: str = "softmax",
    logit_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    duplicates: str = "negative",
    precision: str | None = None,
    deterministic: bool = False,
    chunk_bytes: int | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Image-text contrastive loss over the global batch of N = W * n pairs; the N x N logits are never stored.

    ``kind="softmax"`` is CLIP's symmetric cross-entropy (Radford et al. 2021), ``"sigmoid"`` SigLIP's (Zhai et al.
    2023: the sum over all N texts for each image). Values and gradients follow open_clip's
    ``ClipLoss(local_loss=True, gather_with_grad=True)``: each rank returns the mean over its own n pairs, and the
    gradient of its features is that of the *sum* of all ranks' losses, so that parameter gradients are those of the
    global mean after the averaging of DDP or FSDP. The scale's and the bias's gradients are right after averaging
    too, but split between ranks in another way than open_clip's.

    In one process torch.compile takes it, and :func:`gather_features`, as opaque ops without a graph break
    (``fullgraph=True``); with several ranks it breaks the graph around them. torch.func does not differentiate it.

    Args:
        image_features: float [n, D], usually L2-normalised. Their dtype is that of the products (sums are float32, or
            float64 for float64) unless `precision` says otherwise; autocast does not change it.
        text_features: float [n, D], or what :func:`gather_features` returned.
        logit_scale: 0-d tensor that multiplies the cosines, already exponentiated.
        group: as in :func:`gather_features`.
        logit_bias: 0-d tensor added to the logits; "sigmoid" only, because softmax does not see it.
        label_smoothing: in [0, 1); "softmax" only, spread evenly over the N items of each direction.
        ids: int64 [n]; items with the same id show the same thing. Read unless `duplicates` is "negative".
        duplicates: what another item of the same id is: a "negative"; nothing ("mask": it leaves the denominator); or
            one more positive ("multi_positive": the target is uniform over the items of that id).
        precision: as in :func:`gather_features`; None also accepts a handle of another precision.
        deterministic: two products instead of one (12nND instead of 8nND FLOP) and images are gathered too. Each
            pair's loss, and the features' gradients under ``reduction="sum"``, then do not depend on the world size.
        chunk_bytes: bound of one chunk of logits; the working memory is about three of them. None: 4 MiB on the CPU,
            256 MiB on a GPU.
        reduction: "mean" or "sum" over this rank's pairs, or "none" for [n].
        return_metrics: also return "image_to_text_accuracy" and "text_to_image_accuracy": the share of this rank's
            images (texts) whose best text (image) among all N is their own, or with ids and "multi_positive" one
            of the same id; masked items do not count, ties are misses. 0-d, detached.
        return_lse: also return "image_to_text_lse" and "text_to_image_lse" [n]: the log-sum-exp of the logits of each
            image (text) with all texts (images), the pair's own included. "softmax" only, detached.
        backend: None, or a name in ``CONTRASTIVE_LOSS.names``.

    Returns:
        The loss, float32 (float64 for float64 features); with `return_metrics` or `return_lse` the pair
        (loss, metrics).

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: a second derivative is asked for.
    """
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    options = Options(
        kind, label_smoothing, duplicates, deterministic, chunk_bytes, return_metrics, precision, return_lse
    )
    image = _features("image_features", image_features, precision)
    if isinstance(text_features, GatheredFeatures):
        gathered = text_features
        if group is not None and group is not gathered.ranks.group:
            raise ValueError(f"{OP}: group differs from that of gather_features, want it there only")
        if precision is None:
            image = image.to(gathered.dtype)
        text_dtype = gathered.dtype
    else:
        gathered = None
        text_features = _features("text_features", text_features, precision)
        text_dtype = text_features.dtype
    if text_features.shape != image.shape:
        shapes = f"{tuple(text_features.shape)}, want {tuple(image.shape)}"
        raise ValueError(f"{OP}: text_features has shape {shapes}, the shape of image_features")
    check_device(OP, "text_features", text_features, "image_features", image)
    if text_dtype != image.dtype:
        raise ValueError(
            f"{OP}: text_features is {text_dtype}, want {image.dtype}, the dtype of image_features: "
            "cast one, or give both the same precision"
        )
    _check_scalar("logit_scale", logit_scale, image)
    if logit_bias is not None:
        if options.softmax:
            raise ValueError(f"{OP}: logit_bias is given, want None with kind='softmax', which does not change with it")
        _check_scalar("logit_bias", logit_bias, image)
    ids = _checked_ids(ids, image, options)
    if gathered is None:
        assert isinstance(text_features, Tensor)
        gathered = _gathered(text_features, Ranks(group))
    loss, correct, lse = CONTRASTIVE_LOSS(backend, image, gathered, logit_scale, logit_bias, ids, options)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    if not (return_metrics or return_lse):
        return loss
    metrics = {}
    if return_metrics:
        metrics["image_to_text_accuracy"], metrics["text_to_image_accuracy"] = correct.float().mean(1).unbind(0)
    if return_lse:
        metrics["image_to_text_lse"], metrics["text_to_image_lse"] = lse.unbind(0)
    return loss, metrics


def _check_scalar(name: str, x: Tensor, image: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 0 or not x.is_floating_point() or x.device != image.device:
        on = f" on {x.device}" if isinstance(x, Tensor) else ""
        raise ValueError(f"{OP}: {name} is {describe(x)}{on}, want a 0-d floating-point tensor on {image.device}")


def _checked_ids(ids: Tensor | None, image: Tensor, options: Options) -> Tensor | None:
    """`ids` where the policy reads them, else None."""
    if not options.compares_ids:
        return None
    if ids is None:
        raise ValueError(f"{OP}: ids is None, want int64 [{len(image)}] with duplicates={options.duplicates!r}")
    if ids.shape != image.shape[:1] or ids.dtype != torch.int64 or ids.device != image.device:
        raise ValueError(f"{OP}: ids is {describe(ids)} on {ids.device}, want int64 [{len(image)}] on {image.device}")
    return ids.contiguous()
