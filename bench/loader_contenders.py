"""Loaders of image-text shards: ours, and the peers' at their best, all with the same batches as output.

A batch is uint8 images [B, 224, 224, 3] of RandomResizedCrop(224, scale=(0.9, 1)) with bicubic resize and horizontal
flip, and the captions. open_clip alone makes normalised floats, because its data path knows nothing else. The plan
`CENTER` (whole area, square) leaves everybody the central square alone, so that results can be compared.
"""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.contest import NotMeasuredError, need, need_gpu
from bench.timing import CUDA
from farl_engine.data import CENTER, CropPlan, Loader, SampleOrder, ShardIndex
from farl_engine.data.decoders import choose_decoder

OUTPUT, BATCH, WORKERS = 224, 32, 2
PLAN = CropPlan(scale=(0.9, 1.0), flip=0.5)
SHUFFLE = 64

Batches = Generator[tuple[torch.Tensor, list[str]], None, None]


def ours(shards: list[Path], plan: CropPlan, decoder: str = "cpu") -> Batches:
    device = "cuda" if decoder == "dali" and CUDA else "cpu"
    index = ShardIndex.build(shards)
    made = choose_decoder(decoder, OUTPUT, device=device, threads=WORKERS)
    order = SampleOrder(len(index), BATCH, seed=0)
    settings = {"decoder": made, "plan": plan, "seed": 0, "threads": WORKERS, "prefetch": 4, "device": device}
    with Loader(index, order, max_bad_fraction=1.0, **settings) as loader:
        for batch in loader:
            yield batch.images, batch.captions


def ours_dali(shards: list[Path], plan: CropPlan) -> Batches:
    need_gpu()
    need("nvidia.dali")
    return ours(shards, plan, "dali")


def webdataset_pil(shards: list[Path], plan: CropPlan) -> Batches:
    """The field's usual path: Pillow decodes, torchvision's transforms work on PIL images."""
    need("webdataset")
    transforms = need("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(OUTPUT, plan.scale, plan.ratio, interpolation=bicubic)
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(plan.flip), transforms.PILToTensor()])
    return webdataset_batches(shards, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def webdataset_tensor(shards: list[Path], plan: CropPlan) -> Batches:
    """The faster one: torchvision.io.decode_jpeg, transforms v2 on uint8 tensors."""
    need("webdataset")
    io_, v2 = need("torchvision.io"), need("torchvision.transforms.v2")
    crop = v2.RandomResizedCrop(OUTPUT, plan.scale, plan.ratio, v2.InterpolationMode.BICUBIC)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(plan.flip)])

    def decode(data: bytes) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return transform(io_.decode_jpeg(encoded, mode=io_.ImageReadMode.RGB))

    return webdataset_batches(shards, decode)


def webdataset_batches(shards: list[Path], decode: Callable[[bytes], torch.Tensor]) -> Batches:
    import webdataset

    # An endless stream, so that no epoch's end is timed; each worker has shards of its own.
    settings: dict[str, Any] = {"shardshuffle": False, "nodesplitter": None, "empty_check": False}
    stream: Any = webdataset.WebDataset([str(path) for path in shards], **settings)
    dataset = (
        stream.repeat()
        .shuffle(SHUFFLE, seed=0)
        .to_tuple("jpg", "txt")
        .map_tuple(decode, lambda text: text.decode())
        .batched(BATCH, collation_fn=collate)
    )
    return from_workers(webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS, prefetch_factor=2))


def collate(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    images, captions = zip(*samples, strict=True)
    return torch.stack(images).permute(0, 2, 3, 1), list(captions)


def open_clip(shards: list[Path], plan: CropPlan) -> Batches:
    """open_clip's own `get_wds_dataset` with its transform; captions are not tokenized, as nobody's are here.

    Two things are changed, so that it works with today's webdataset and shuffles as the others do; see the comments.

    Raises:
        NotMeasuredError: it is not installed, or not as expected.
    """
    transform_module, data = need("open_clip.transform"), open_clip_data()
    transform = transform_module.image_transform(OUTPUT, is_train=True, aug_cfg={"scale": plan.scale})
    transform.transforms[0].ratio = plan.ratio
    # Flipping, which it does not do, costs the others a little.
    transform.transforms.insert(1, need("torchvision.transforms").RandomHorizontalFlip(plan.flip))
    # Its own reading of tars stumbles over what webdataset hands on since 0.2.87; this is what that is made of.
    data.tarfile_to_samples_nothrow = need("webdataset").tarfile_to_samples(handler=data.log_and_continue)
    # Its buffer of 1,000 samples before the first would read these small sets several times over.
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = SHUFFLE
    settings = SimpleNamespace(
        train_data=f"{shards[0].parent}/photographs-{{000..{len(shards) - 1:03d}}}.tar",
        train_num_samples=1 << 20,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        workers=WORKERS,
        world_size=1,
        seed=0,
    )
    info = data.get_wds_dataset(settings, transform, is_train=True, tokenizer=lambda text: [text])
    return from_workers(info.dataloader)


def open_clip_data() -> Any:
    """open_clip_train.data; it wants pandas for CSV files alone, so an empty module does where that is absent."""
    absent = [name for name in ("pandas",) if name not in sys.modules and _missing(name)]
    sys.modules.update({name: types.ModuleType(name) for name in absent})
    try:
        return need("open_clip_train.data")
    finally:
        for name in absent:
            del sys.modules[name]


def _missing(name: str) -> bool:
    try:
        need(name)
    except NotMeasuredError:
        return True
    return False


def from_workers(loader: Iterable[Any]) -> Batches:
    """Batches of a loader with processes, which end with the generator."""
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        del iterator


def dali_reader(shards: list[Path], plan: CropPlan) -> Batches:
    """DALI alone: its own tar reader, its own random crops; decoding on the GPU where there is one."""
    dali = need("nvidia.dali")
    fn, types = need("nvidia.dali.fn"), need("nvidia.dali.types")

    @dali.pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=0 if CUDA else None, prefetch_queue_depth=2)
    def graph() -> Any:
        encoded, text = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            ext=["jpg", "txt"],
            random_shuffle=plan is not CENTER,
            initial_fill=SHUFFLE,
            missing_component_behavior="error",
            name="reader",
        )
        device = "mixed" if CUDA else "cpu"
        if plan is CENTER:
            shape = fn.peek_image_shape(encoded)
            side = fn.cast(fn.reductions.min(shape[:2]), dtype=types.FLOAT)
            picture = fn.decoders.image(encoded, device=device)
            crop = fn.crop(picture, crop_w=side, crop_h=side, rounding="truncate")
        else:
            crop = fn.decoders.image_random_crop(
                encoded, device=device, random_area=plan.scale, random_aspect_ratio=plan.ratio
            )
        resized = fn.resize(crop, size=(OUTPUT, OUTPUT), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(resized, horizontal=fn.random.coin_flip(probability=plan.flip)), text

    pipeline = graph()
    pipeline.build()
    try:
        while True:
            pictures, texts = pipeline.run()
            # The tensors that come out are DALI's own until the next call.
            images = torch.from_dlpack(pictures.as_tensor()).clone()
            yield images, [bytes(np.asarray(text)).decode() for text in texts]
    finally:
        del pipeline


def as_bytes(images: torch.Tensor) -> np.ndarray[Any, Any]:
    """uint8 [B, S, S, 3] on the host; open_clip's normalised floats [B, 3, S, S] are turned back."""
    if images.dtype == torch.uint8:
        return images.cpu().numpy()
    constants = need("open_clip.constants")
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD)
    )
    return (images * std + mean).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


CONTENDERS: dict[str, Callable[[list[Path], CropPlan], Batches]] = {
    "farl_engine": ours,
    "farl_engine, DALI": ours_dali,
    "webdataset + torchvision PIL": webdataset_pil,
    "webdataset + torchvision v2": webdataset_tensor,
    "open_clip's data path (float output)": open_clip,
    "DALI's own reader": dali_reader,
}
