"""Pictures a second from tar shards to uint8 batches: our loader against webdataset with torchvision's transforms.

Two workers each: threads here, processes there. Two peers: the field's usual path (Pillow decode, torchvision
transforms on PIL images) and the faster one (torchvision.io.decode_jpeg, transforms v2 on uint8 tensors). Before any
time is taken, all three must give the same pictures for the central crop.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.contest import NotMeasuredError, leave_out, need
from bench.deadline import out_of_time
from farl_engine import data as farl_data
from farl_engine.data import CENTER, CropPlan

OUTPUT, BATCH, BATCHES, WORKERS = 112, 64, 4, 2
PLAN = CropPlan(scale=(0.9, 1.0), flip=0.5)


@pytest.fixture(scope="module", params=[250, 512])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 JPEGs of quality 90 with detail like a photograph's (about 0.9 bits a pixel)."""
    for module in ("simplejpeg", "webdataset"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    side, rng = request.param, np.random.default_rng(0)
    samples = []
    for i in range(128):
        layers = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for size in (6, side // 8)]
        coarse, fine = (Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC) for layer in layers)
        buffer = io.BytesIO()
        Image.blend(coarse, fine, 0.2).save(buffer, "JPEG", quality=90)
        samples.append({"key": f"{i:06d}", "image": buffer.getvalue(), "caption": f"a made picture, number {i}"})
    return farl_data.write_shards(samples, tmp_path_factory.mktemp(f"{side}px", numbered=False) / "train-%03d.tar")[0]


def ours(shard: Path, plan: CropPlan) -> Iterator[tuple[torch.Tensor, list[str]]]:
    index = farl_data.ShardIndex.build(shard)
    order = farl_data.SampleOrder(len(index), BATCH, seed=0)
    settings = {"decoder": farl_data.CpuDecoder(OUTPUT), "plan": plan, "seed": 0, "threads": WORKERS, "prefetch": 4}
    with farl_data.Loader(index, order, **settings) as loader:
        for batch in loader:
            yield batch.images, batch.captions


def webdataset_pil(shard: Path, plan: CropPlan) -> Iterator[tuple[torch.Tensor, list[str]]]:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    if plan is CENTER:
        resize = transforms.Resize(OUTPUT, interpolation=bicubic)
        steps = [resize, transforms.CenterCrop(OUTPUT), transforms.PILToTensor()]
    else:
        crop = transforms.RandomResizedCrop(OUTPUT, plan.scale, plan.ratio, interpolation=bicubic)
        steps = [crop, transforms.RandomHorizontalFlip(plan.flip), transforms.PILToTensor()]
    transform = transforms.Compose(steps)

    def decode(data: bytes) -> torch.Tensor:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    return webdataset_batches(shard, decode)


def webdataset_tensor(shard: Path, plan: CropPlan) -> Iterator[tuple[torch.Tensor, list[str]]]:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    if plan is CENTER:
        transform = v2.Compose([v2.Resize(OUTPUT, bicubic), v2.CenterCrop(OUTPUT)])
    else:
        crop = v2.RandomResizedCrop(OUTPUT, plan.scale, plan.ratio, bicubic)
        transform = v2.Compose([crop, v2.RandomHorizontalFlip(plan.flip)])

    def decode(data: bytes) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return transform(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    return webdataset_batches(shard, decode)


def webdataset_batches(
    shard: Path, decode: Callable[[bytes], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    import webdataset

    # Every worker reads the one shard; an endless stream, so that no epoch's end is timed.
    settings = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None, "empty_check": False}
    stream: Any = webdataset.WebDataset(str(shard), **settings)
    dataset = (
        stream.repeat()
        .shuffle(64, seed=0)
        .to_tuple("jpg", "txt")
        .map_tuple(decode, lambda text: text.decode())
        .batched(BATCH, collation_fn=collate)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS, prefetch_factor=2)
    return iter(loader)


def collate(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    images, captions = zip(*samples, strict=True)
    return torch.stack(images).permute(0, 2, 3, 1), list(captions)


LOADERS = {
    "farl_engine": ours,
    "webdataset + torchvision PIL": webdataset_pil,
    "webdataset + torchvision v2": webdataset_tensor,
}


def pictures(batches: Iterator[tuple[torch.Tensor, list[str]]]) -> dict[str, np.ndarray[Any, Any]]:
    """Caption -> picture, until each of 32 samples came."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    wanted = {f"a made picture, number {i}" for i in range(32)}
    while not wanted <= found.keys():
        images, captions = next(batches)
        found.update(zip(captions, images.numpy(), strict=True))
    return {caption: found[caption] for caption in wanted}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's own threads would take the cores from the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOADERS)
def test_loader(benchmark: Any, shard: Path, name: str) -> None:
    shape = f"{shard.parent.name} to {OUTPUT} px, batch {BATCH}, {WORKERS} workers"
    labels = {"op": "loader", "shape": shape, "mode": "both", "contender": name}
    benchmark.group = f"loader | {shape}"
    benchmark.extra_info |= labels
    try:
        if out_of_time():
            raise NotMeasuredError("out of time")
        if name != "farl_engine":
            need("torchvision")
            need("webdataset")
    except NotMeasuredError as error:
        leave_out(labels, str(error))
    expected, got = pictures(ours(shard, CENTER)), pictures(LOADERS[name](shard, CENTER))
    for caption, picture in expected.items():
        assert np.abs(picture.astype(int) - got[caption]).mean() < 1.0
    batches = LOADERS[name](shard, PLAN)
    benchmark.pedantic(lambda: [next(batches) for _ in range(BATCHES)], rounds=4, warmup_rounds=1)
    if benchmark.enabled:
        stats = benchmark.stats.stats
        benchmark.extra_info |= {
            "seconds": stats.median / BATCHES,
            "spread_seconds": stats.iqr / BATCHES,
            "timed": "calls in a loop",
            "pictures_per_second": BATCHES * BATCH / stats.median,
        }
