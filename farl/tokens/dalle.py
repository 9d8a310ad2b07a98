"""Visual tokens of DALL-E's discrete VAE (Ramesh et al. 2021): its encoder, in the parameter names of `openai/DALL-E`.

The architecture follows the facts of `dall_e/encoder.py`; no code or weights of it are here. Whoever has OpenAI's
`encoder.pkl` converts it once: `python -m farl.tokens convert encoder.pkl encoder.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

PIXELS_PER_TOKEN = 8
_GROUPS = 4
# 128 images of 112 pixels. Activations of the first group take 0.8 GB each for them in half precision, and four are
# alive at once; 5,120 images in one piece would need 130 GB.
_PIXELS_AT_ONCE = 128 * 112 * 112
# 64 MiB in fp32; those of 75 masked cells of 5,120 images would be 12.6 GB.
_LOGITS_AT_ONCE = 1 << 24


class _Conv(nn.Module):
    """Square convolution that keeps the size, with OpenAI's parameter names `w` and `b`."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # cuDNN would copy a weight of another layout than the input's at every call: here the cast does it. On a CPU
        # oneDNN has a layout of its own.
        layout = torch.channels_last if x.is_cuda else torch.preserve_format
        return F.conv2d(x, self.w.to(x.dtype, memory_format=layout), self.b.to(x.dtype), padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """x + gain * four convolutions, each after a ReLU; a 1x1 convolution on the way past where the width changes."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        hidden = outputs // 4
        self.gain = gain
        self.id_path = _Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = nn.Sequential()
        widths = [inputs, hidden, hidden, hidden, outputs]
        for i, kernel in enumerate((3, 3, 3, 1)):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", _Conv(widths[i], widths[i + 1], kernel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


class DalleEncoder(nn.Module):
    """RGB bytes -> one of `vocab_size` tokens for every 8 x 8 pixels.

    Args:
        vocab_size, hidden, blocks_per_group: sizes; the defaults are those of the released encoder.
        token_image_size: side in pixels of the images that it wants: 112 gives the 14 x 14 grid of ViT-B/16 at 224.
        compute_dtype: of all convolutions but the last, which runs in fp32. None is the released code's choice: fp16 on
            CUDA, fp32 elsewhere. There bf16 is no faster and rounds eight times as coarsely, but cannot overflow;
            `agreement_with_fp32` tells what either does to the tokens of given weights.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        *,
        hidden: int = 256,
        blocks_per_group: int = 2,
        token_image_size: int = 112,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if token_image_size < 1 or token_image_size % PIXELS_PER_TOKEN:
            raise ValueError(f"token_image_size: wanted a multiple of {PIXELS_PER_TOKEN}, got {token_image_size}")
        if hidden % 4:
            raise ValueError(f"hidden: wanted a multiple of 4, got {hidden}")
        self.vocab_size = vocab_size
        self.token_image_size: int | None = token_image_size
        self.compute_dtype = compute_dtype
        gain = 1 / (_GROUPS * blocks_per_group) ** 2
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", _Conv(3, hidden, 7))
        width = hidden
        for group in range(_GROUPS):
            layers = nn.Sequential()
            for block in range(blocks_per_group):
                layers.add_module(f"block_{block + 1}", _Block(width, hidden << group, gain))
                width = hidden << group
            if group < _GROUPS - 1:
                layers.add_module("pool", nn.MaxPool2d(2))
            self.blocks.add_module(f"group_{group + 1}", layers)
        output = nn.Sequential()
        output.add_module("relu", nn.ReLU())
        output.add_module("conv", _Conv(width, vocab_size, 1))
        self.blocks.add_module("output", output)
        self.requires_grad_(False)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], *, token_image_size: int = 112, compute_dtype: torch.dtype | None = None
    ) -> DalleEncoder:
        """An encoder of the sizes of `state` (OpenAI's key names) with its weights.

        Raises:
            ValueError: keys or shapes are not those of a dVAE encoder.
        """
        try:
            hidden, vocab_size = len(state["blocks.input.w"]), len(state["blocks.output.conv.w"])
        except KeyError as error:
            raise ValueError(f"state: no {error}: not the weights of a DALL-E encoder") from None
        numbers = [int(m[1]) for key in state if (m := re.match(r"blocks\.group_1\.block_(\d+)\.", key))]
        encoder = cls(
            vocab_size,
            hidden=hidden,
            blocks_per_group=max(numbers, default=1),
            token_image_size=token_image_size,
            compute_dtype=compute_dtype,
        )
        try:
            encoder.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(f"state: not the weights of a DALL-E encoder: {' '.join(str(error).split())}") from None
        return encoder

    @classmethod
    def from_file(
        cls, path: str | Path, *, token_image_size: int = 112, compute_dtype: torch.dtype | None = None
    ) -> DalleEncoder:
        """Load a .safetensors file in the layout of `state_dict`, as `convert_encoder_pickle` writes it.

        Raises:
            ValueError: the file is missing or not such a file.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        try:
            state = load_file(path)
        except Exception as error:  # safetensors has its own exception type, which is no ValueError
            raise ValueError(
                f"{path}: not a safetensors file ({error}); convert OpenAI's file with "
                f"`python -m farl.tokens convert encoder.pkl {Path(path).stem}.safetensors`"
            ) from None
        return cls.from_state_dict(state, token_image_size=token_image_size, compute_dtype=compute_dtype)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of all cells, or of those at `positions`: only there the last convolution and argmax run. No sync.

        Args:
            images: uint8 [B, H, W, 3]; H and W multiples of 8, `token_image_size` as a rule.
            positions: int32 [B, K] cell indices, padded with -1, as `sample_block_masks` gives them.

        Returns:
            int64 [B, P] with P = (H / 8) (W / 8), row by row; or int64 [B, K], -1 where `positions` is.

        Raises:
            ValueError: an argument of the wrong shape, dtype or range.
        """
        if positions is not None and (positions.ndim != 2 or len(positions) != len(images)):
            raise ValueError(
                f"positions: wanted int32 [{len(images)}, K], got {positions.dtype} {tuple(positions.shape)}"
            )
        _check_images(images)
        # Nearly equal pieces: convolutions of a few images may round differently from those of many.
        pieces = max(1, -(-images.shape[:3].numel() // _PIXELS_AT_ONCE))
        chosen = [None] * pieces if positions is None else positions.chunk(pieces)
        with torch.autocast(images.device.type, enabled=False):
            found = [self._tokens(part, where) for part, where in zip(images.chunk(pieces), chosen, strict=False)]
        return torch.cat(found)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have torch.compile join biases, ReLUs and sums between the convolutions into single passes.

        Each stage by itself; the first images of another number then wait for the compiler. Arguments as of
        `torch.nn.Module.compile`. The parameters and their names stay.
        """
        for stage in self._stages():
            stage.compile(*args, **kwargs)

    def _stages(self) -> list[nn.Module]:
        """All but the last convolution, in order."""
        return [part for name, part in self.blocks.named_children() if name != "output"]

    @torch.no_grad()
    def logits(self, images: torch.Tensor, compute_dtype: torch.dtype | None = None) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> fp32 [B, P, vocab_size]; `compute_dtype` in place of the encoder's own."""
        _check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            return F.linear(self._cells(images, compute_dtype).float(), *self._output_weights())

    def _tokens(self, images: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        cells = self._cells(images)
        if positions is None:
            return self._argmax(cells)
        index = positions.long().clamp(min=0)[:, :, None].expand(-1, -1, cells.shape[2])
        return self._argmax(cells.gather(1, index)).masked_fill(positions < 0, -1)

    def _cells(self, images: torch.Tensor, compute_dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the last convolution reads, after its ReLU: [B, P, 8 * hidden] in the dtype of the convolutions.

        The bytes come with their colours innermost, so that all convolutions run channels-last.
        """
        # map_pixels of dall_e/utils.py: the logit-Laplace range [0.1, 0.9].
        x = images.permute(0, 3, 1, 2).float() / 255 * 0.8 + 0.1
        x = x.to(compute_dtype or self.compute_dtype or (torch.float16 if images.is_cuda else torch.float32))
        for stage in self._stages():
            x = stage(x)
        return F.relu(x).flatten(2).transpose(1, 2)

    def _output_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.get_submodule("blocks.output.conv")
        assert isinstance(output, _Conv)
        return output.w.float().flatten(1), output.b.float()

    def _argmax(self, cells: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> int64 [B, N]."""
        weight, bias = self._output_weights()
        count = cells.shape[0] * cells.shape[1]
        # Parts of nearly equal size: products with a few rows round differently from those with many.
        rows = cells.flatten(0, 1).chunk(max(1, -(-count // max(1, _LOGITS_AT_ONCE // self.vocab_size))))
        tokens = [F.linear(part.float(), weight, bias).argmax(1) for part in rows]
        return torch.cat(tokens).view(cells.shape[:2])


def _check_images(images: torch.Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images: wanted uint8 [B, H, W, 3], got {images.dtype} {tuple(images.shape)}")
    if images.shape[1] % PIXELS_PER_TOKEN or images.shape[2] % PIXELS_PER_TOKEN:
        raise ValueError(f"images: wanted sides that are multiples of 8, got {images.shape[1]} x {images.shape[2]}")
