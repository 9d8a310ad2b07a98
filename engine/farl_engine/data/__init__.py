"""Tar shards in, batches out: index, order, augmentation, decoding and the threaded loader.

Names load on first use, so that `import farl_engine.data` needs neither torch nor an image library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farl_engine.data.augment import CENTER, CropPlan
    from farl_engine.data.bad_data import BadDataError, BadImage
    from farl_engine.data.decode_cpu import CpuDecoder
    from farl_engine.data.decode_dali import DaliDecoder
    from farl_engine.data.decoders import choose_decoder
    from farl_engine.data.face_crop import FaceCropPlan
    from farl_engine.data.index import ShardIndex
    from farl_engine.data.loader import Batch, Loader
    from farl_engine.data.order import MixedOrder, SampleOrder
    from farl_engine.data.shard_cache import ShardCache
    from farl_engine.data.shards import ShardWriter, write_shards

_HOME = {
    "CENTER": "augment",
    "CropPlan": "augment",
    "BadDataError": "bad_data",
    "BadImage": "bad_data",
    "CpuDecoder": "decode_cpu",
    "DaliDecoder": "decode_dali",
    "FaceCropPlan": "face_crop",
    "ShardIndex": "index",
    "Batch": "loader",
    "Loader": "loader",
    "MixedOrder": "order",
    "SampleOrder": "order",
    "ShardCache": "shard_cache",
    "ShardWriter": "shards",
    "choose_decoder": "decoders",
    "write_shards": "shards",
}

__all__ = [
    "CENTER",
    "BadDataError",
    "BadImage",
    "Batch",
    "CpuDecoder",
    "CropPlan",
    "DaliDecoder",
    "FaceCropPlan",
    "Loader",
    "MixedOrder",
    "SampleOrder",
    "ShardCache",
    "ShardIndex",
    "ShardWriter",
    "choose_decoder",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"farl_engine.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'farl_engine.data' has no attribute {name!r}")
