"""A linear probe: logistic regression of binary attributes on frozen features, without any randomness."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farl.evaluation.measures import accuracies, average_precision, mean_of_known, number_or_none, roc_auc

# Of the mean loss: 1e-4 hardly binds, 1 leaves little more than the majority class.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MAX_ITERATIONS = 200


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    names: list[str],
    *,
    validation: Tensor,
    penalties: tuple[float, ...] = PENALTIES,
) -> dict[str, Any]:
    """Fit one logistic regression an attribute and judge them on the test set.

    Features are L2-normalised, then standardised with the training set's mean and deviation. The penalty of each
    attribute is the one of the lowest loss on `validation`, and the final fit is on the whole training set.

    Args:
        train_features: [N, E]; test_features: [M, E], as the model gives them.
        train_labels: [N, A]; test_labels: [M, A]; 0, 1 or NaN (unknown).
        names: A names.
        validation: bool [N], the part of the training set that chooses penalties; it should hold other people than the
            rest. All False: the middle penalty is taken.

    Returns:
        `attributes`: {name: accuracy (yes above a probability of one half), balanced_accuracy (yes above the share of
        positives in the training set, or a rare attribute would never be answered), average_precision, auc,
        majority_accuracy (always answering the more frequent class of the training set), chance_average_precision
        (share of positives), penalty, positives in train and test}, and `mean`: the means of these figures over the
        attributes that have them. None where a figure has no meaning, as an average precision without a positive.

    Raises:
        ValueError: an empty training or test set.
    """
    if len(train_features) == 0 or len(test_features) == 0:
        raise ValueError(
            f"the linear probe got {len(train_features)} training and {len(test_features)} test images with labels; "
            "wanted some of both: more images, or other --probe-train shards"
        )
    normalised = F.normalize(train_features.double(), dim=1)
    mean, deviation = normalised.mean(0), normalised.std(0, correction=0).clamp_min(1e-8)
    train = (normalised - mean) / deviation
    test = (F.normalize(test_features.double(), dim=1) - mean) / deviation
    labels = train_labels.double()

    penalty = torch.full((labels.shape[1],), penalties[len(penalties) // 2], dtype=torch.float64)
    if validation.any() and not validation.all():
        losses = []
        for candidate in penalties:
            weight, bias = fit_logistic(train[~validation], labels[~validation], torch.full_like(penalty, candidate))
            losses.append(_mean_loss(train[validation] @ weight.T + bias, labels[validation]))
        penalty = torch.tensor(penalties, dtype=torch.float64)[torch.stack(losses).argmin(0)]
    weight, bias = fit_logistic(train, labels, penalty)
    return _judge(test @ weight.T + bias, labels, test_labels.double(), names, penalty)


def fit_logistic(features: Tensor, labels: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + penalty / 2 * |weight|**2 for all attributes at once, by full-batch L-BFGS from 0.

    Args:
        features: float64 [N, E]; labels: float64 [N, A] of 0, 1 or NaN; penalty: float64 [A].

    Returns:
        weight float64 [A, E] and bias float64 [A]. The problem is convex and nothing is drawn: the result is fixed. An
        attribute with one class only gets zero weights and a bias that answers with it.
    """
    known = ~labels.isnan()
    positives = (known & (labels == 1)).sum(0).double()
    count = known.sum(0).double()
    weight = torch.zeros(labels.shape[1], features.shape[1], dtype=torch.float64)
    bias = torch.logit((positives + 0.5) / (count + 1))
    both = (positives > 0) & (positives < count)
    if not both.any():
        return weight, bias
    target = labels[:, both].nan_to_num(0.0)
    share = known[:, both] / count[both]
    ridge = penalty[both, None] / 2
    w = weight[both].requires_grad_()
    b = bias[both].requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=MAX_ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (F.binary_cross_entropy_with_logits(features @ w.T + b, target, reduction="none") * share).sum()
        loss = loss + (ridge * w.square()).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight[both], bias[both] = w.detach(), b.detach()
    return weight, bias


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [A]; 0 where nothing is labelled, so that the first penalty is taken there."""
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none") * known
    return loss.sum(0) / known.sum(0).clamp_min(1)


def _judge(logits: Tensor, train: Tensor, test: Tensor, names: list[str], penalty: Tensor) -> dict[str, Any]:
    share = (train == 1).sum(0) / (~train.isnan()).sum(0)
    majority = (share > 0.5).expand(test.shape)
    figures = {
        "accuracy": accuracies(logits > 0, test)[0],
        "balanced_accuracy": accuracies(logits > torch.logit(share.double()), test)[1],
        "average_precision": average_precision(logits, test),
        "auc": roc_auc(logits, test),
        "majority_accuracy": accuracies(majority, test)[0],
        "chance_average_precision": (test == 1).sum(0).double() / (~test.isnan()).sum(0),
    }
    # Guessing has an average precision where the probe has one, so that the two means are over the same attributes.
    figures["chance_average_precision"][figures["average_precision"].isnan()] = torch.nan
    attributes = {
        name: {key: number_or_none(values[a]) for key, values in figures.items()}
        | {
            "penalty": penalty[a].item(),
            "train_positives": int((train[:, a] == 1).sum()),
            "test_positives": int((test[:, a] == 1).sum()),
        }
        for a, name in enumerate(names)
    }
    return {"attributes": attributes, "mean": {key: mean_of_known(values) for key, values in figures.items()}}
