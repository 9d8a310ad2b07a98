"""What a token cache says of itself, and how two such descriptions are told apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farl.tokens.codebook import PatchCodebook
from farl.tokens.dalle import DalleEncoder
from farl.tokens.tokenizer import VisualTokenizer
from farl_engine.data import CpuDecoder

FORMAT = 1
MANIFEST, CODEBOOK = "manifest.json", "codebook.safetensors"
# At most some seconds of work are lost with a block, and few enough blocks that waiting for the disk costs nothing.
_SMALLEST_BLOCK, _LARGEST_BLOCK, _WANTED_BLOCKS = 32, 4096, 256


@dataclass(frozen=True)
class Manifest:
    """What a cache holds: manifest.json has these fields.

    Attributes:
        fingerprint, samples: of the data, see `ShardIndex`.
        tokenizer: "kind" (codebook or dalle), "hash" of the weights, "vocab_size", "token_image_size", and "file".
        seed, augmentation: of the crops; `augmentation` as `describe_plan` gives it.
        views, image_size, patches: K views a sample, pixels a side, P tokens a view.
        decoder, device, precision: what computed the tokens.
        versions: of the packages that decoded and computed, and what else may change the last bit.
        block: samples in a block.
        command: what makes, goes on with or checks this cache.
    """

    fingerprint: str
    samples: int
    tokenizer: dict[str, Any]
    seed: int
    augmentation: dict[str, Any]
    views: int
    image_size: int
    patches: int
    decoder: str
    device: str
    precision: str
    versions: dict[str, str]
    block: int
    command: str
    format: int = FORMAT

    @property
    def num_blocks(self) -> int:
        return -(-self.samples // self.block)

    @property
    def bytes(self) -> int:
        """Size of the cache on the disk, about."""
        return self.samples * self.views * (self.patches * self.dtype.itemsize + 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 wherever every token fits, the vocabulary of exactly 65,536 included."""
        return np.dtype("<u2" if self.tokenizer["vocab_size"] <= 1 << 16 else "<u4")

    def block_range(self, block: int) -> tuple[int, int]:
        """First sample of a block and the one after its last."""
        return block * self.block, min((block + 1) * self.block, self.samples)

    def contents(self) -> dict[str, str]:
        """What the tokens are of, in words to compare and to show."""
        crops = ", ".join(f"{name} {value}" for name, value in self.augmentation.items())
        return {
            "data fingerprint": self.fingerprint[:12],
            "samples": f"{self.samples:,}",
            "tokenizer": f"{self.tokenizer['kind']} {self.tokenizer['hash'][:12]}",
            "seed": str(self.seed),
            "augmentation": crops,
            "views": str(self.views),
            "image size": str(self.image_size),
            "patches": str(self.patches),
        }

    def arithmetic(self) -> dict[str, str]:
        """What can change single tokens."""
        # The codebook's integers are the same everywhere; then only a decoder on the device knows the device.
        anywhere = self.precision == "exact" and self.decoder == "cpu"
        return {
            "decoder": self.decoder,
            "device": "any" if anywhere else self.device,
            "precision": self.precision,
        }

    @property
    def is_reproducible(self) -> bool:
        """Whether the same arithmetic gives the same bits. On a GPU the convolutions of an encoder, and which of its
        engines decodes a JPEG, go by the place in a batch and its size."""
        return self.device == "cpu" or self.arithmetic()["device"] == "any"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a cache. ValueError if there is none, it is damaged, or of another format."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            made_by = values["format"]
            if made_by == FORMAT:
                return cls(**values)
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no token cache: make one with `python -m farl.data tokenize`") from None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} is damaged: delete {folder} and make the cache again") from None
        raise ValueError(f"{folder} has format {made_by}, this version reads {FORMAT}: make the cache again")

    def write(self, folder: Path) -> None:
        """Puts it into the folder, whole or not at all. OSError where that cannot be written."""
        temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
        with temporary.open("w") as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST)

    def also_made_with(self, versions: Mapping[str, str]) -> Manifest:
        """The manifest of a cache of which a part was made with other versions: it is like none of them."""
        both = {}
        for name in sorted(self.versions.keys() | versions.keys()):
            known, new = self.versions.get(name, "none"), versions.get(name, "none")
            both[name] = known if new in known.split(" and ") else f"{known} and {new}"
        return replace(self, versions=both)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two descriptions, as one phrase; empty where nothing does."""
    return "; ".join(
        f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value
    )


def describe_plan(plan: Any) -> dict[str, Any]:
    """Settings of a crop plan (a dataclass) as JSON values; an array stands as its hash."""
    assert is_dataclass(plan)
    return {field.name: _plain(getattr(plan, field.name)) for field in fields(plan)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(value).view(np.uint8).data, digest_size=8).hexdigest()
    if is_dataclass(value):
        return describe_plan(value)
    return list(value) if isinstance(value, tuple) else value


def describe_tokenizer(tokenizer: VisualTokenizer, file: str) -> dict[str, Any]:
    """`Manifest.tokenizer` of a `PatchCodebook` or `DalleEncoder`; `file` is where the latter came from."""
    codebook = isinstance(tokenizer, PatchCodebook)
    return {
        "kind": "codebook" if codebook else "dalle",
        "hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "token_image_size": tokenizer.token_image_size,
        "file": CODEBOOK if codebook else str(Path(file).absolute()),
    }


def tokenizer_hash(tokenizer: VisualTokenizer) -> str:
    """32 hex digits of the weights of a `PatchCodebook` or `DalleEncoder`, the same on every device."""
    assert isinstance(tokenizer, PatchCodebook | DalleEncoder)
    return state_hash(tokenizer.state_dict())


def state_hash(state: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits of named tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        array = np.ascontiguousarray(value.detach().cpu().numpy())
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def precision_of(tokenizer: VisualTokenizer, device: torch.device) -> str:
    """The arithmetic of a tokenizer on a device: "exact" (integers), "fp32", "fp16" or "bf16"."""
    if isinstance(tokenizer, PatchCodebook):
        return "exact"
    dtype = getattr(tokenizer, "compute_dtype", None) or (torch.float16 if device.type == "cuda" else torch.float32)
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def arithmetic_of(decoder: Any, tokenizer: VisualTokenizer, device: torch.device) -> dict[str, Any]:
    """`decoder`, `device`, `precision` and `versions` of a manifest."""
    name = "cpu" if isinstance(decoder, CpuDecoder) else "dali"
    packages = ["torch", "pillow", "simplejpeg"]
    if name == "dali":
        packages += ["nvidia-dali-cuda130", "nvidia-dali-cuda120"]
    versions, precision = _versions(packages), precision_of(tokenizer, device)
    if device.type == "cpu" and precision != "exact":
        # Sums of floats are cut up by the length of its vectors.
        versions["CPU"] = torch.backends.cpu.get_cpu_capability()
    return {
        "decoder": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "versions": versions,
    }


def _versions(packages: list[str]) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def block_samples(samples: int) -> int:
    """Samples in a block of a new cache."""
    wanted = -(-samples // (_WANTED_BLOCKS * _SMALLEST_BLOCK)) * _SMALLEST_BLOCK
    return min(max(wanted, _SMALLEST_BLOCK), _LARGEST_BLOCK)
