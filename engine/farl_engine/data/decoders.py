"""Which decoder a run takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from farl_engine.data.decode_cpu import CpuDecoder

if TYPE_CHECKING:
    from farl_engine.data.decode_dali import DaliDecoder

DECODERS = ("auto", "dali", "cpu")


def choose_decoder(
    name: str,
    image_size: int,
    token_size: int | None = None,
    device: torch.device | str = "cpu",
    *,
    threads: int = 4,
) -> CpuDecoder | DaliDecoder:
    """The decoder called `name`.

    Args:
        name: "dali", "cpu", or "auto": DALI on a CUDA device where it is installed, otherwise the CPU decoder.
        image_size, token_size: sides of the outputs.
        device: of the run.
        threads: DALI's own host threads.

    Raises:
        ValueError: no such name, or DALI is asked for and not installed.
    """
    if name not in DECODERS:
        raise ValueError(f"decoder is {name!r}; use {', '.join(DECODERS[:-1])} or {DECODERS[-1]}")
    device = torch.device(device)
    if name == "cpu" or (name == "auto" and device.type != "cuda"):
        return CpuDecoder(image_size, token_size)
    from farl_engine.data.decode_dali import DaliDecoder, import_dali

    if name == "auto":
        try:
            import_dali()
        except ValueError:
            return CpuDecoder(image_size, token_size)
    return DaliDecoder(image_size, token_size, device, threads=threads)
