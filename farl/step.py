"""One FaRL training step: contrastive loss on the clean images, masked-token loss on the masked ones, backward.

Every figure it returns is this rank's share of the global one (the shares add up), and the gradients it leaves are
those of the global batch, whatever the number of ranks or micro-batches.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from farl.buckets import padded
from farl.masking import mask_sizes
from farl.model import FaRL, PackedText, TrainingOutput
from farl.tokenizer import CONTEXT_LENGTH, pack
from farl.tokens import DalleEncoder, VisualTokenizer
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_engine.profiler import note, part
from farl_kernels import contrastive_loss, gather_features, sample_block_masks, use_backend
from farl_kernels.contrastive import GatheredFeatures


@dataclass(frozen=True)
class Masks:
    """Masked patches of a batch.

    Attributes:
        mask: bool [n, P], True = masked.
        positions: int32 [n, K], ascending, padded with -1.
        targets: int64 [n, K], visual tokens at `positions`, -1 where padded.
        share: 0-d float32; multiplies this rank's sum of losses to give its share of the mean over the global batch.
    """

    mask: Tensor
    positions: Tensor
    targets: Tensor
    share: Tensor

    def part(self, rows: slice) -> Masks:
        """Those of some samples; the share is still that of the whole global batch."""
        return Masks(self.mask[rows], self.positions[rows], self.targets[rows], self.share)


@dataclass(frozen=True)
class TextParts:
    """The captions of a batch, cut into micro-batches (one part where there are none).

    Cutting reads lengths on the host, so the loader's threads do it before the batch moves to a device.
    """

    parts: tuple[PackedText, ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> TextParts:
        """The same captions on `device`."""
        return TextParts(tuple(part.to(device, non_blocking=non_blocking) for part in self.parts))

    def pin_memory(self) -> TextParts:
        """The same captions in page-locked memory."""
        return TextParts(tuple(part.pin_memory() for part in self.parts))


def pack_parts(captions: list[str], micro_batch: int, *, pad: bool = False) -> TextParts:
    """Tokenize, pack and cut into parts of `micro_batch` captions, the last one of what is left; 0 does not cut.

    With `pad`, to one of a few lengths (see `farl.buckets`).
    """
    whole, size = pack(captions), micro_batch or len(captions)
    parts = tuple(whole.part(slice(start, start + size)) for start in range(0, len(captions), size))
    return TextParts(padded(parts, CONTEXT_LENGTH) if pad else parts)


@dataclass(frozen=True)
class FeatureGradient:
    """Leaves at which the contrastive loss of a whole batch has left its gradient: what each micro-batch carries on.

    Attributes:
        image_features, text_features: [n, embed_dim], of all micro-batches.
        logit_scale: 0-d.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor

    def carried(self, output: TrainingOutput, rows: slice, *, with_scale: bool) -> Tensor:
        """A scalar with the gradient of the loss by way of `output`, the samples `rows` computed again.

        The scale's gradient is whole already: it enters with one of the micro-batches.
        """
        image, text, scale = self.image_features.grad, self.text_features.grad, self.logit_scale.grad
        assert image is not None and text is not None and scale is not None
        assert output.image_features is not None and output.text_features is not None
        carried = (output.image_features * image[rows]).sum() + (output.text_features * text[rows]).sum()
        return carried + output.logit_scale * (scale if with_scale else 0.0)


class TrainStep:
    """Callable on a `Batch`: leaves gradients on the parameters, returns this rank's shares of the figures to log.

    The batch is on the rank's device, its text from `pack_parts`. More than one part takes two passes (see
    `_accumulate`), with no more than a part's images and captions in memory at once.

    Args:
        network: the model, wrapped in DDP where there is more than one rank.
        tokenizer: visual tokens for the masked branch, of batches that come without; None trains with the contrastive
            loss alone.
        mim_weight: weight of the masked-token loss.
        contrastive_weight: weight of the contrastive loss; 0 computes neither it nor the text tower nor the clean
            images, of a model that was told so (`FaRL.train_masked_branch_alone`).
        mask_ratio: largest share of patches to mask in an image.
        bf16: run the towers in bfloat16 (by `FaRL.compute_dtype`, without torch.autocast); parameters and their
            gradients stay float32.
        engine: "fused" takes the fastest backend of each op; "eager" the plain reference of each; "compile" those
            under torch.compile, one graph of both towers for captions of all lengths, and DALL-E's encoder likewise;
            "graph" is "fused" in an update that is recorded (`farl_engine.graphs`). The losses are the same.
    """

    def __init__(
        self,
        network: FaRL | DistributedDataParallel,
        world: World,
        tokenizer: VisualTokenizer | None,
        *,
        mim_weight: float,
        contrastive_weight: float = 1.0,
        mask_ratio: float,
        seed: int,
        bf16: bool,
        engine: str = "fused",
    ) -> None:
        self._network = network
        self._model: FaRL = network.module if isinstance(network, DistributedDataParallel) else network
        self._world = world
        self._tokenizer = tokenizer
        self._mim_weight = mim_weight
        # DDP averages gradients over ranks: each rank's mean is right for the contrast, and the share of the masked
        # loss, which is a sum over ranks, is scaled up by their number.
        self._backward_weight = mim_weight * world.size
        self._contrastive_weight = contrastive_weight
        self._max_masked, self._min_block = mask_sizes(self._model.config.vision.grid, mask_ratio)
        self._seed = seed
        self._compute_dtype = torch.bfloat16 if bf16 else None
        self._backend = None if engine in ("fused", "graph") else "reference"
        self._compiled = engine == "compile"
        if self._compiled:
            # The call of the model alone: an evaluation encodes with the plain methods.
            self._model.compile()
            if isinstance(tokenizer, DalleEncoder):
                tokenizer.compile()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        texts: tuple[PackedText, ...] = batch.text.parts
        note("caption tokens", sum(len(text.tokens) for text in texts))
        if self._compiled:
            texts = tuple(self._any_length(text) for text in texts)
        with use_backend(self._backend) if self._backend else contextlib.nullcontext():
            with part("masks"):
                masks = self.sample_masks(batch) if self._tokenizer is not None else None
            if len(texts) == 1:
                return self._whole(batch.images, texts[0], masks)
            return self._accumulate(batch.images, texts, masks)

    @torch.no_grad()
    def sample_masks(self, batch: Batch) -> Masks:
        """Masks and targets of a batch: a pure function of seed, sample ids and views (and of the pixels).

        Targets are the batch's own visual tokens where the loader brings them, else the tokenizer's.
        """
        mask, positions = sample_block_masks(
            batch.ids,
            batch.views,
            grid=self._model.config.vision.grid,
            max_masked=self._max_masked,
            min_block=self._min_block,
            seed=self._seed,
        )
        kept = None
        if batch.visual_tokens is not None:
            kept = batch.visual_tokens.gather(1, positions.long().clamp(min=0)).long().masked_fill(positions < 0, -1)
        # A cache has no tokens of samples that were bad when it was made: those are no targets.
        count = ((positions if kept is None else kept) >= 0).sum().to(torch.float32)
        if self._world.size > 1:
            dist.all_reduce(count)
        if kept is None:
            assert self._tokenizer is not None
            with part("visual tokens"):
                kept = self._tokenizer(batch.images if batch.token_images is None else batch.token_images, positions)
        return Masks(mask, positions, kept, 1.0 / count.clamp(min=1.0))

    def _forward(
        self, images: Tensor, text: PackedText, masks: Masks | None, *, exchange: bool = False
    ) -> TrainingOutput:
        captions = text if self._contrastive_weight else None
        branch: dict[str, Any] = {"exchange": self._send} if exchange else {}
        if masks is not None:
            branch |= {"mask": masks.mask, "masked_positions": masks.positions, "targets": masks.targets}
        with part("model"), self._precision():
            return self._network(images, captions, **branch)

    def _any_length(self, text: PackedText) -> PackedText:
        """The same captions, for which no graph is compiled anew when the next ones are longer or shorter."""
        torch._dynamo.mark_dynamic(text.tokens, 0)
        return replace(text, max_seqlen=self._model.text_config.context_length)

    def _whole(self, images: Tensor, text: PackedText, masks: Masks | None) -> dict[str, Tensor]:
        output = self._forward(images, text, masks, exchange=True)
        mim, figures = self._mim(output, masks)
        loss = self._backward_weight * mim
        contrast = torch.zeros((), device=self._world.device)
        if self._contrastive_weight:
            assert output.image_features is not None and output.gathered is not None
            contrast, more = self._contrast(output.image_features, output.gathered, output.logit_scale)
            loss = loss + self._contrastive_weight * contrast
            figures = more | figures
        with part("gradients"):
            loss.backward()
        return self._figures(contrast, mim, figures)

    def _accumulate(self, images: Tensor, texts: tuple[PackedText, ...], masks: Masks | None) -> dict[str, Tensor]:
        """Exact gradients of the whole batch from micro-batches (gradient caching, Gao et al. 2021).

        The contrastive loss needs all features at once, so they are computed first without a graph; its gradient with
        respect to them is then carried into a second pass, micro-batch by micro-batch.
        """
        ends = list(itertools.accumulate(len(text) for text in texts))
        parts = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        contrast, figures, gradient = torch.zeros((), device=self._world.device), {}, None
        if self._contrastive_weight:
            with torch.no_grad(), part("model"), self._precision():
                outputs = [self._model(images[rows], text) for rows, text in zip(parts, texts, strict=True)]
            gradient = FeatureGradient(
                torch.cat([output.image_features for output in outputs]).requires_grad_(),
                torch.cat([output.text_features for output in outputs]).requires_grad_(),
                outputs[0].logit_scale.detach().requires_grad_(),
            )
            gathered = self._send(gradient.text_features)
            contrast, figures = self._contrast(gradient.image_features, gathered, gradient.logit_scale)
            with part("gradients"):
                (self._contrastive_weight * contrast).backward()

        mims: list[Tensor] = []
        mim_figures: dict[str, Tensor] = {}
        for index, (rows, text) in enumerate(zip(parts, texts, strict=True)):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                some = masks.part(rows) if masks is not None else None
                output = self._forward(images[rows], text, some)
                mim, counted = self._mim(output, some)
                loss = self._backward_weight * mim
                if gradient is not None:
                    loss = loss + gradient.carried(output, rows, with_scale=last)
                with part("gradients"):
                    loss.backward()
            mims.append(mim.detach())
            mim_figures = {name: mim_figures.get(name, 0) + value for name, value in counted.items()}
        return self._figures(contrast, torch.stack(mims).sum(), figures | mim_figures)

    @staticmethod
    def _send(text_features: Tensor) -> GatheredFeatures:
        """Start sending these features to the other ranks."""
        with part("contrastive loss"):
            return gather_features(_unit(text_features))

    def _contrast(
        self, image_features: Tensor, text: GatheredFeatures, logit_scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's mean of the contrastive loss over the global batch, and accuracies within it."""
        with part("contrastive loss"):
            result = contrastive_loss(_unit(image_features), text, logit_scale, return_metrics=True)
        assert isinstance(result, tuple)
        loss, metrics = result
        figures = {
            "accuracy_image_to_text": metrics["image_to_text_accuracy"] / self._world.size,
            "accuracy_text_to_image": metrics["text_to_image_accuracy"] / self._world.size,
        }
        return loss, figures

    def _mim(self, output: TrainingOutput, masks: Masks | None) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the mean masked-token loss of the global batch."""
        if masks is None:
            return torch.zeros((), device=self._world.device), {}
        assert output.mim_loss_sum is not None and output.mim_correct is not None
        return output.mim_loss_sum * masks.share, {"accuracy_mim": output.mim_correct * masks.share}

    def _figures(self, contrast: Tensor, mim: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
        contrast, mim = contrast.detach() / self._world.size, mim.detach()
        loss = self._contrastive_weight * contrast + self._mim_weight * mim
        return {"loss": loss, "loss_contrastive": contrast, "loss_mim": mim, **others}

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """The model's forward pass in the step's dtype; what else uses the model (an evaluation) has its own.

        The backward pass needs nothing of it: what it computes again has its dtype from the tensors that were kept.
        """
        before = self._model.compute_dtype
        self._model.compute_dtype = self._compute_dtype or before
        try:
            yield
        finally:
            self._model.compute_dtype = before

    def _no_sync(self) -> contextlib.AbstractContextManager[object]:
        if isinstance(self._network, DistributedDataParallel):
            return self._network.no_sync()
        return contextlib.nullcontext()


def _unit(features: Tensor) -> Tensor:
    """Normalised in fp32 at least; the exchange and the products then run in the dtype of the towers."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return F.normalize(features.to(wide), dim=-1).to(features.dtype)


def clamp_logit_scale(model: FaRL, largest: float = 4.605170185988092) -> dict[str, Tensor]:
    """Keep the logarithm of the scale in [0, ln 100] (Radford et al. 2021); returns the scale for the log."""
    with torch.no_grad():
        model.logit_scale.clamp_(0.0, largest)
        return {"logit_scale": model.logit_scale.exp()}
