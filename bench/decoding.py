"""What is looked at of decoding with DALI: its rate by image size and load split, and what it does with bad images.

Everything here also runs with DALI on a CPU, so that a GPU machine is not the first to try it; what is measured there
is not written down.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.loader_contenders import OUTPUT, PLAN
from bench.photographs import made_photograph
from farl_engine.data import CpuDecoder, Loader, SampleOrder, ShardIndex, write_shards
from farl_engine.data.bad_data import BadImage

LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
SIZES = {"250 px": (250, 250), "500 px": (500, 400), "1000 px": (1000, 750)}
# Making a large one takes a tenth of a second, so there are not more of a size; decoders remember nothing of them.
DISTINCT = 64
# A tar of photographs (images with captions, as for training) that was carried to the machine.
PHOTOGRAPHS = "FARL_PHOTOGRAPHS"
# Mean absolute difference of a picture, in steps of 1/255, from which on it counts as another picture.
OTHER_PICTURE = 4.0


def decoder_of(device: str, load: float = 0.65, threads: int = 8) -> Any:
    from farl_engine.data.decode_dali import DaliDecoder

    return DaliDecoder(OUTPUT, device=device, hw_decoder_load=load, threads=threads)


def encoded(size: tuple[int, int], count: int) -> list[bytes]:
    """`count` made photographs as JPEGs of quality 90, of which `DISTINCT` differ."""
    rng, found = np.random.default_rng(0), []
    for _ in range(min(count, DISTINCT)):
        buffer = io.BytesIO()
        made_photograph(rng, *size).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return [found[i % DISTINCT] for i in range(count)]


def decoded_batches(decoder: Any, images: Sequence[bytes], batch: int) -> Generator[int, None, None]:
    """Decodes from memory without end, with as many runs in flight as DALI takes; yields after each batch.

    Raises:
        ValueError: DALI refused a sound photograph.
    """
    numbers = np.arange(len(images))
    parameters = PLAN.parameters(0, numbers, np.zeros_like(numbers))
    prepared = [decoder.prepare(image, PLAN, row) for image, row in zip(images, parameters, strict=True)]
    session, rows = decoder.open(batch), list(range(batch))
    # Several batches of room, so that a batch is not written while the one before it is read.
    room = [session.empty(batch, pin=False)[0] for _ in range(2)]
    try:
        given = taken = 0
        while True:
            while given - taken < session.max_runs:
                session.submit([prepared[(given * batch + i) % len(prepared)] for i in rows])
                given += 1
            if not session.collect(rows, room[taken % 2], None):
                raise ValueError("DALI refused a sound photograph")
            taken += 1
            yield batch
    finally:
        session.close()


def spoiled(image: bytes, kind: int) -> bytes:
    """One of six faults that web data has."""
    middle = len(image) // 2
    return (
        image[:middle],
        image[:-40],
        b"<!DOCTYPE html><html>not found</html>",
        image[: middle - 50] + b"\xff\xd9" + image[middle - 50 :],
        image[:middle] + bytes(200) + image[middle + 200 :],
        b"\xff\xd8\xff",
    )[kind % 6]


def photograph_shards(folder: Path, size: tuple[int, int], count: int, spoiled_every: int = 0) -> list[Path]:
    """Shards of made photographs of which each `spoiled_every`-th is spoiled in one of six ways."""
    samples = []
    for i, image in enumerate(encoded(size, count)):
        bad = spoiled_every and i % spoiled_every == spoiled_every // 2
        content = spoiled(image, i // spoiled_every) if bad else image
        samples.append({"key": f"{i:06d}", "image": content, "caption": f"photograph number {i}"})
    return write_shards(samples, folder / "photographs-%03d.tar", samples_per_shard=-(-count // 2))


def batches_of(shards: Sequence[Path], decoder: Any, device: str, batch: int, steps: int) -> tuple[Loader, Iterator]:
    """A loader over the shards, and its iterator."""
    index = ShardIndex.build(list(shards))
    settings: dict[str, Any] = {"plan": PLAN, "seed": 0, "threads": 4, "max_bad_fraction": 1.0, "end_step": steps}
    order = SampleOrder(len(index), batch, seed=0)
    loader = Loader(index, order, decoder=decoder, device=device, **settings)
    return loader, iter(loader)


def recovery(folder: Path, device: str, *, count: int = 600, batch: int = 64) -> str:
    """One epoch with spoiled images through DALI and through the CPU decoder: ids and counts must be the same.

    Raises:
        AssertionError: they are not.
    """
    shards, steps = photograph_shards(folder, SIZES["250 px"], count, spoiled_every=12), count // batch
    found = []
    for decoder in (decoder_of(device), CpuDecoder(OUTPUT)):
        loader, stream = batches_of(shards, decoder, device, batch, steps)
        with loader:
            used = [made.used_ids.tolist() for made in stream]
            found.append((used, loader.bad_samples))
    assert all(len(ids) == batch for ids in found[0][0])
    assert found[0] == found[1], "DALI's loader used other samples than the CPU decoder's"
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(found[0][1].items()))
    return (
        f"Bad images: {steps} full batches of {batch} from a set with 8 % spoiled in six ways; same samples and counts "
        f"as with the CPU decoder ({causes})."
    )


def memory_course(folder: Path, device: str, *, batches: int = 1000, batch: int = 64) -> list[int]:
    """Bytes in use on the whole GPU after each tenth of the batches, from images of all sizes mixed."""
    images = [encoded(size, 1)[0] for size in SIZES.values()]
    samples = [{"key": f"{i:04d}", "image": images[i % len(images)], "caption": "a photograph"} for i in range(192)]
    shards = write_shards(samples, folder / "mixed-%03d.tar", samples_per_shard=64)
    loader, stream = batches_of(shards, decoder_of(device), device, batch, batches)
    used = []
    with loader:
        for number, _ in enumerate(stream, 1):
            if number % max(1, batches // 10) == 0:
                free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
                used.append(total - free)
    return used


def waited(shards: Sequence[Path], device: str, step_seconds: float, *, batch: int, steps: int) -> dict[str, float]:
    """Shares of the time that a step of `step_seconds` on the device waits, with the loader's busy stages."""
    from farl_engine.data.stages import stage_shares

    loader, stream = batches_of(shards, decoder_of(device), device, batch, steps + 5)
    with loader:
        begun = 0.0
        for number, _ in enumerate(stream):
            if number == 5:
                loader.stage_times()
                begun = time.perf_counter()
            busy(device, step_seconds)
        seconds = time.perf_counter() - begun
        return stage_shares(loader.stage_times(), seconds)


def busy(device: str, seconds: float) -> None:
    """Keeps the GPU's matrix units at work for so long, as a training step does, and waits for it."""
    if device != "cuda":
        time.sleep(seconds)
        return
    x = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(4):
            torch.mm(x, x)
        torch.cuda.synchronize()


def disagreements(images: Sequence[tuple[str, bytes]], device: str) -> dict[str, list[Any]]:
    """Images on which DALI and the CPU decoder differ, each asked alone for the same box, fully decoded.

    Args:
        images: (name, encoded image).

    Returns:
        "refused": names that DALI refuses; "taken": names that it takes though the CPU decoder calls them bad;
        "other": [name, mean difference in 1/255] of other pictures; "differences": of all that both decode.
    """
    cpu, decoder = CpuDecoder(OUTPUT, reduce=False), decoder_of(device)
    session = decoder.open(1)
    room = session.empty(1, pin=False)[0]
    found: dict[str, list[Any]] = {"refused": [], "taken": [], "other": [], "differences": []}
    try:
        for number, (name, image) in enumerate(images):
            row = PLAN.parameters(0, np.array([number]), np.array([0]))[0]
            prepared = decoder.prepare(image, PLAN, row)
            if prepared is None:
                continue
            session.submit([prepared])
            sound = session.collect([0], room, None)
            session.synchronize()
            try:
                expected = cpu.decode(image, PLAN, row)[0]
            except BadImage:
                if sound:
                    found["taken"].append(name)
                continue
            if not sound:
                found["refused"].append(name)
                continue
            difference = float(np.abs(room[0].cpu().numpy().astype(int) - expected).mean())
            found["differences"].append(difference)
            if difference > OTHER_PICTURE:
                found["other"].append([name, round(difference, 2)])
    finally:
        session.close()
    return found


def carried_photographs(folder: Path) -> tuple[str, list[tuple[str, bytes]]]:
    """What to compare the decoders on: the carried tar, else made photographs of odd kinds. (what, [(name, image)])"""
    path = os.environ.get(PHOTOGRAPHS)
    if path:
        index = ShardIndex.build(path, cache=False)
        return f"photographs of {Path(path).name}", [(index.key(i), index.read(i)[0]) for i in range(len(index))]
    images = []
    for i in range(60):
        picture = made_photograph(np.random.default_rng(i), 200 + 7 * i, 160 + 5 * i)
        options = {"quality": 60 + i % 36, "subsampling": i % 3, "progressive": i % 4 == 0}
        buffer = io.BytesIO()
        (picture.convert("L") if i % 5 == 0 else picture).save(buffer, "JPEG", **options)
        images.append((f"made {i}", buffer.getvalue()))
    return f"made photographs ({PHOTOGRAPHS} names no tar of real ones)", images
