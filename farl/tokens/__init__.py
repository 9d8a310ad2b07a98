"""Visual tokens: what the masked image modelling branch predicts."""

from __future__ import annotations

from farl.tokens.cache import TokenCache
from farl.tokens.codebook import PatchCodebook
from farl.tokens.convert import convert_encoder_pickle
from farl.tokens.dalle import DalleEncoder
from farl.tokens.tokenizer import VisualTokenizer

__all__ = [
    "DalleEncoder",
    "PatchCodebook",
    "TokenCache",
    "VisualTokenizer",
    "convert_encoder_pickle",
]
