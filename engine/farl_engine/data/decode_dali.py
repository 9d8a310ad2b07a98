"""Whole batches of JPEGs decoded, cropped, resized and flipped by NVIDIA DALI, on a GPU or (the same graph) on the CPU.

Division of work: a JPEG that passes `plain_jpeg_size` goes to DALI, with the box that the plan gives for the size in
its header. Everything else goes to a CpuDecoder, and so does what DALI refuses: the refused run is split until the
refused image stands alone, so that it costs one sample, and the pixels of a sample never depend on its neighbours.

The CPU decoder's verdict is the rule. DALI's would be another: it takes damaged files without a word, more of them on
a GPU. It need not be asked, because whatever passes the check is a picture for the CPU decoder as well. What can still
differ are the pixels of a file whose compressed bits are damaged and whose markers are not: both decoders then give
a picture with a broken part. All pixels differ a little (colour and resize arithmetic, and DALI always decodes fully
where the CPU decoder decodes large JPEGs at reduced size). On a GPU, which JPEGs the hardware engine takes depends on
their place in the batch, and so may the last bit of their pixels; `hw_decoder_load` 0 or 1 leaves no such choice.

Nothing here has a state that a checkpoint would need: DALI draws no random numbers.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from farl_engine.data.augment import Plan
from farl_engine.data.decode_cpu import MAX_PIXELS, CpuDecoder
from farl_engine.data.jpeg_structure import plain_jpeg_size

# The share of JPEGs for the hardware engine. DALI's own default: with 0.90, more of the GPU is left to training, but
# one batch in a hundred came 40 % later (34 ms against 25) in NVIDIA's measurements (NVIDIA/DALI, pull request 6366).
HW_DECODER_LOAD = 0.65
# Runs that DALI works on at once: the host part of one beside the device part of another, and one to wait.
RUNS_IN_FLIGHT = 3
# Pixels that colour jitter turns to fp32 at once.
_JITTER_PIXELS = 1 << 23
_LOG_EVERY = 1000

logger = logging.getLogger("farl_engine.data")


class Encoded(NamedTuple):
    """One JPEG and what is to be made of it."""

    data: bytes
    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[float, float, float] | None

    @property
    def pixels(self) -> int:
        """Area of the box."""
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


class DaliDecoder:
    """What `CpuDecoder` does, for whole batches. Stateless: the DALI pipeline belongs to what `open` returns.

    Args:
        image_size: side S of the output.
        token_size: side T of a second output from the same box (Lanczos).
        device: a CUDA device, or the CPU.
        max_pixels: as of `CpuDecoder`.
        hw_decoder_load: share of the JPEGs for the GPU's hardware engine, 0..1; nearer to 1 leaves more of the GPU to
            training, at the price of some late batches.
        threads: DALI's own host threads, which share the JPEGs that the hardware engine does not take.

    Raises:
        ValueError: DALI is not installed, or an argument is out of range.
    """

    def __init__(
        self,
        image_size: int,
        token_size: int | None = None,
        device: torch.device | str = "cpu",
        max_pixels: int = MAX_PIXELS,
        *,
        hw_decoder_load: float = HW_DECODER_LOAD,
        threads: int = 4,
    ) -> None:
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load must be in 0..1, got {hw_decoder_load}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.image_size = image_size
        self.token_size = token_size
        self.device = torch.device(device)
        self.cpu = CpuDecoder(image_size, token_size, max_pixels)
        self.hw_decoder_load = hw_decoder_load
        self.threads = threads
        import_dali()

    def decode_into(
        self,
        data: bytes,
        plan: Plan,
        parameters: NDArray[np.float64] | Sequence[float] | None,
        image: NDArray[np.uint8],
        tokens: NDArray[np.uint8] | None,
    ) -> None:
        """One picture, by the CPU decoder."""
        self.cpu.decode_into(data, plan, parameters, image, tokens)

    def prepare(
        self, data: bytes, plan: Plan, parameters: NDArray[np.float64] | Sequence[float] | None
    ) -> Encoded | None:
        """What DALI needs of an encoded image, from its markers; None leaves it to the CPU decoder."""
        size = plain_jpeg_size(data)
        if size is None or size[0] * size[1] > self.cpu.max_pixels:
            return None
        return Encoded(data, plan.box(parameters, *size), plan.flips(parameters), plan.jitter(parameters))

    def open(self, batch_size: int) -> DaliSession:
        """A pipeline for runs of up to `batch_size` images.

        Raises:
            ValueError: DALI does not work on this device.
        """
        return DaliSession(self, batch_size)


class DaliSession:
    """A DALI pipeline with up to `RUNS_IN_FLIGHT` runs in it, first in, first out; for one thread at a time.

    Raises:
        ValueError: DALI does not work on this device.
    """

    max_runs = RUNS_IN_FLIGHT

    def __init__(self, decoder: DaliDecoder, batch_size: int) -> None:
        self._decoder = decoder
        self.device = decoder.device
        # DALI reads the bytes in place, so they must live until their run has ended.
        self._in_flight: deque[Sequence[Encoded]] = deque()
        self._refusals = 0
        self._stream: torch.cuda.Stream | None = None
        try:
            if self.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.device)
            self._pipeline = _build(decoder, batch_size)
            self._warm_up()
        except RuntimeError as error:
            raise ValueError(
                f"DALI does not decode on {self.device} ({_reason(error)}); take the CPU decoder (--decoder cpu)"
            ) from error

    def empty(self, count: int, *, pin: bool = False) -> tuple[Tensor, Tensor | None]:
        """Room for a batch on the session's device, uint8 [n, S, S, 3] and [n, T, T, 3] or None.

        With `pin`, what lies in CPU memory is page-locked.
        """

        def make(size: int) -> Tensor:
            pinned = pin and self._stream is None
            return torch.empty(count, size, size, 3, dtype=torch.uint8, device=self.device, pin_memory=pinned)

        with self._on_stream():
            tokens = self._decoder.token_size
            return make(self._decoder.image_size), None if tokens is None else make(tokens)

    def submit(self, run: Sequence[Encoded]) -> None:
        """Starts on 1..batch_size images and does not wait for them; at most `max_runs` may be uncollected."""
        assert len(self._in_flight) < self.max_runs
        self._feed(run)
        self._in_flight.append(run)
        self._pipeline.schedule_run()

    def collect(self, rows: Sequence[int], images: Tensor, tokens: Tensor | None) -> bool:
        """Waits for the oldest run and writes its pictures into `rows` of the given tensors.

        Returns:
            False where DALI refused the run for the sake of one or more of its images; nothing is written then.
        """
        run = self._in_flight.popleft()
        try:
            outputs = self._pipeline.share_outputs(cuda_stream=self._stream)
        except RuntimeError as error:
            self._pipeline.release_outputs()
            self._refusals += 1
            if self._refusals == 1 or self._refusals % _LOG_EVERY == 0:
                logger.warning("refusal no. %d by DALI, of %d images: %s", self._refusals, len(run), _reason(error))
            return False
        with self._on_stream():
            index = self._sent(torch.tensor(rows))
            for target, output in zip((images, tokens), outputs, strict=False):
                assert target is not None
                target.index_copy_(0, index, self._jittered(_as_torch(output), run))
        # The memory of a GPU's outputs is given back in the order of the stream, behind the copies.
        del outputs
        self._pipeline.release_outputs()
        return True

    def fill(
        self,
        rows: Sequence[int],
        pictures: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]],
        images: Tensor,
        tokens: Tensor | None,
    ) -> None:
        """Writes pictures of the CPU decoder into `rows`."""
        with self._on_stream():
            index = self._sent(torch.tensor(rows))
            for target, arrays in zip((images, tokens), zip(*pictures, strict=True), strict=True):
                if target is not None:
                    target.index_copy_(0, index, self._sent(torch.from_numpy(np.stack(arrays))))

    def synchronize(self) -> None:
        """Waits until everything written is there, for any stream; the thread sleeps meanwhile."""
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
            done.synchronize()

    def close(self) -> None:
        """Waits for the runs in flight and gives the pipeline's memory back."""
        while self._in_flight:
            self._in_flight.popleft()
            self._discard()
        self.synchronize()
        self._pipeline = None

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor on the session's device; only page-locked memory can be copied without waiting for the GPU."""
        return tensor if self._stream is None else tensor.pin_memory().to(self.device, non_blocking=True)

    def _jittered(self, pictures: Tensor, run: Sequence[Encoded]) -> Tensor:
        """The pictures, with the colour jitter of those that have one."""
        if all(encoded.jitter is None for encoded in run):
            return pictures
        factors = self._sent(torch.tensor([encoded.jitter or (1.0, 1.0, 1.0) for encoded in run], dtype=torch.float32))
        step = max(1, _JITTER_PIXELS // pictures[0, ..., 0].numel())
        parts = zip(pictures.split(step), factors.split(step), strict=True)
        return torch.cat([color_jitter(part, factor) for part, factor in parts])

    def _on_stream(self) -> Any:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _warm_up(self) -> None:
        """Fills DALI's queue once, as its first call asks; shows, too, whether it works here at all."""
        tiny = Encoded(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), (0, 0, 16, 16), False, None)
        for _ in range(RUNS_IN_FLIGHT):
            self._feed([tiny])
        self._pipeline.schedule_run()
        for _ in range(RUNS_IN_FLIGHT):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()

    def _feed(self, run: Sequence[Encoded]) -> None:
        boxes = np.array([encoded.box for encoded in run], np.int32)
        self._pipeline.feed_input("encoded", [np.frombuffer(encoded.data, np.uint8) for encoded in run])
        self._pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
        self._pipeline.feed_input("end", np.ascontiguousarray(boxes[:, 2:]))
        self._pipeline.feed_input("flip", np.array([encoded.flip for encoded in run], np.int32))

    def _discard(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._pipeline.share_outputs()
        self._pipeline.release_outputs()


def import_dali() -> Any:
    """The package `nvidia.dali`.

    Raises:
        ValueError: it is not installed, or does not load.
    """
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the dali decoder needs NVIDIA DALI ({error}): pip install 'farl-engine[dali]', or 'farl-engine"
            "[dali-cuda12]' on CUDA 12"
        ) from error
    return nvidia.dali


def _build(decoder: DaliDecoder, batch_size: int) -> Any:
    dali = import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = decoder.device.type == "cuda"
    device_id = None
    if on_gpu:
        device_id = torch.cuda.current_device() if decoder.device.index is None else decoder.device.index
    settings: dict[str, Any] = {}
    if on_gpu:
        # The CPU decoder's chroma upsampling; and no thread tied to a core that another process's threads are tied to.
        settings = {"hw_decoder_load": decoder.hw_decoder_load, "jpeg_fancy_upsampling": True, "affine": False}
    sizes = [(decoder.image_size, types.INTERP_CUBIC)]
    if decoder.token_size is not None:
        sizes.append((decoder.token_size, types.INTERP_LANCZOS3))
    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=decoder.threads,
        device_id=device_id,
        prefetch_queue_depth=RUNS_IN_FLIGHT,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        end = fn.external_source(name="end", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        # Decodes no more of the image than the box needs. Only upright images come here.
        crop = fn.decoders.image_slice(
            encoded,
            device="mixed" if on_gpu else "cpu",
            start=start,
            end=end,
            axis_names="WH",
            output_type=types.RGB,
            adjust_orientation=False,
            **settings,
        )
        resized = (fn.resize(crop, size=(s, s), interp_type=kind, antialias=True) for s, kind in sizes)
        pipeline.set_outputs(*(fn.flip(picture, horizontal=flip) for picture in resized))
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """What happened, out of DALI's message of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    return told[0] if told else type(error).__name__


def _as_torch(output: Any) -> Tensor:
    """The pictures of a DALI TensorList without a copy, uint8 [m, S, S, 3]."""
    return torch.from_dlpack(output.as_tensor())


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """`farl_engine.data.augment.color_jitter` of a batch, in torch.

    Args:
        images: uint8 [n, H, W, 3].
        factors: fp32 [n, 3] of brightness, contrast, saturation.

    Returns:
        uint8 [n, H, W, 3].
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    x = (images.float() * brightness).clamp_(max=255)
    mean = _gray(x).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    x = (contrast * x + (1 - contrast) * mean).clamp_(0, 255)
    x = (saturation * x + (1 - saturation) * _gray(x)).clamp_(0, 255)
    return x.round_().to(torch.uint8)


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=-1)
    # Not a matrix product, whose precision would hang on what training allows.
    return 0.299 * red + 0.587 * green + 0.114 * blue
