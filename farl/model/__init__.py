"""The FaRL model: image tower, text tower, masked branch, and the loading of released weights."""

from farl.model.config import IMAGE_MEAN, IMAGE_STD, MODELS, MimConfig, ModelConfig, TextConfig, VisionConfig
from farl.model.farl import FaRL, TrainingOutput
from farl.model.text import PackedText
from farl.model.vision import resize_position_embedding
from farl.model.weights import load_pretrained

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "MODELS",
    "FaRL",
    "MimConfig",
    "ModelConfig",
    "PackedText",
    "TextConfig",
    "TrainingOutput",
    "VisionConfig",
    "load_pretrained",
    "resize_position_embedding",
]
