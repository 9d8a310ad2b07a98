"""What a model has learned: retrieval, zero-shot attributes and a linear probe, on features computed once."""

from __future__ import annotations

from farl.evaluation.features import Features, extract_features
from farl.evaluation.linear_probe import linear_probe
from farl.evaluation.retrieval import evaluate_retrieval, retrieval_figures
from farl.evaluation.zero_shot import zero_shot_attributes

__all__ = [
    "Features",
    "evaluate_retrieval",
    "extract_features",
    "linear_probe",
    "retrieval_figures",
    "zero_shot_attributes",
]
