from __future__ import annotations

import pytest
import torch

from farl.evaluation.linear_probe import fit_logistic, linear_probe

NAMES = ["told", "noise", "never", "always"]


def made_data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose first direction tells the first attribute, and nothing tells the second."""
    generator = torch.Generator().manual_seed(seed)
    told = torch.rand(count, generator=generator) < 0.3
    noise = torch.rand(count, generator=generator) < 0.5
    features = torch.randn(count, 40, generator=generator)
    features[:, 0] = torch.where(told, 4.0, -4.0) + features[:, 0]
    never = torch.zeros(count)
    return features * 7 + 1, torch.stack([told.float(), noise.float(), never, never + 1], 1)


def probe(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> dict:
    validation = torch.arange(len(train[0])) % 5 == 0
    return linear_probe(*train, *test, NAMES, validation=validation)


def test_finds_what_can_be_separated_and_nothing_else() -> None:
    result = probe(made_data(300, 0), made_data(600, 1))
    told, noise = result["attributes"]["told"], result["attributes"]["noise"]
    assert told["accuracy"] > 0.98 and told["balanced_accuracy"] > 0.98 and told["average_precision"] > 0.98
    assert 0.6 < told["majority_accuracy"] < 0.8
    assert told["chance_average_precision"] == pytest.approx(told["test_positives"] / 600)
    assert abs(noise["balanced_accuracy"] - 0.5) < 0.1 and abs(noise["auc"] - 0.5) < 0.1
    assert noise["penalty"] > told["penalty"]


def test_attributes_of_one_class_are_answered_with_it() -> None:
    result = probe(made_data(100, 0), made_data(60, 1))
    for name in ("never", "always"):
        figures = result["attributes"][name]
        assert figures["accuracy"] == figures["majority_accuracy"] == 1
        assert figures["balanced_accuracy"] is None
    assert result["attributes"]["never"]["average_precision"] is None
    assert result["mean"]["accuracy"] is not None


def test_is_the_same_every_time_and_ignores_unknown_labels() -> None:
    features, labels = made_data(200, 3)
    test = made_data(100, 4)
    assert probe((features, labels), test) == probe((features, labels), test)
    # Samples without labels change nothing but the standardisation: with the same features twice, not even that.
    doubled = torch.cat([features, features]), torch.cat([labels, torch.full_like(labels, torch.nan)])
    validation = torch.arange(200) % 5 == 0
    once = linear_probe(features, labels, *test, NAMES, validation=validation)
    twice = linear_probe(*doubled, *test, NAMES, validation=torch.cat([validation, validation]))
    told, again = once["attributes"]["told"], twice["attributes"]["told"]
    assert told["average_precision"] == pytest.approx(again["average_precision"], abs=1e-9)


def test_the_fit_is_the_minimum() -> None:
    features, labels = made_data(150, 5)
    features, labels = features.double() / 7, labels.double()[:, :2]
    penalty = torch.tensor([0.1, 0.01], dtype=torch.float64)
    weight, bias = fit_logistic(features, labels, penalty)
    residual = torch.sigmoid(features @ weight.T + bias) - labels
    gradient = residual.T @ features / len(features) + penalty[:, None] * weight
    assert gradient.abs().max() < 1e-5 and residual.mean(0).abs().max() < 1e-5


def test_empty_sides_are_refused() -> None:
    features, labels = made_data(5, 0)
    with pytest.raises(ValueError, match="got 0 training and 5 test images"):
        linear_probe(features[:0], labels[:0], features, labels, NAMES, validation=torch.zeros(0, dtype=torch.bool))
