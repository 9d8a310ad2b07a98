"""`python -m farl.evaluate CHECKPOINT --data SHARDS --json OUT`: retrieval, zero-shot attributes, linear probe."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from farl import cli

if TYPE_CHECKING:
    import torch

    from farl.evaluation.attributes_table import AttributeTable
    from farl.evaluation.features import Features

# Share of a probe's training part that chooses penalties; the rest is fitted.
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class EvaluateOptions:
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Folder of a run (its latest checkpoint), a checkpoint file, or weights in CLIP's or FaRL's layout."""
    data: str
    """Shards to evaluate on: a path, or a glob in quotes."""
    json: str = ""
    """File for all figures; only the table is printed if empty."""
    attributes: str = ""
    """CSV of binary labels (first column: key or image path) for zero-shot and the linear probe."""
    probe_train: str = ""
    """Shards to fit the probe on; if empty, a part of --data (other people than the rest, where the CSV names them)."""
    probe_test_share: float = 0.3
    """Share of --data that tests the probe, where there is no --probe-train."""
    max_pairs: int = 0
    """Take so many pairs of --data at equal distances; 0 takes all."""
    batch_size: int = 64
    """Pairs a forward pass."""
    threads: int = 2
    """Decoding threads."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    seed: int = 0
    """Seed of the splits of the probe, and of --untrained weights."""
    untrained: bool = False
    """Take random weights of the checkpoint's sizes instead of its own: the figures that training has to beat."""

    def __post_init__(self) -> None:
        for name in ("max_pairs", "batch_size", "threads"):
            least = 0 if name == "max_pairs" else 1
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more")
        if not 0 < self.probe_test_share < 1:
            raise ValueError(f"--probe-test-share is {self.probe_test_share}; it must be between 0 and 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}; use auto, cpu or cuda")
        if self.probe_train and not self.attributes:
            raise ValueError("--probe-train needs --attributes CSV")


def main(argv: list[str] | None = None) -> int:
    options = cli.parse(
        EvaluateOptions,
        argv,
        prog="farl.evaluate",
        description="Image-text retrieval, zero-shot attributes and a linear probe of a trained model.",
    )
    if options.json and not Path(options.json).resolve().parent.is_dir():
        raise ValueError(f"--json {options.json}: the folder {Path(options.json).parent} is not there; make it first")
    from farl.evaluation.table import report_table

    report = evaluate(options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(report_table(report))
    return 0


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """All that the command reports, as it is written to --json.

    Raises:
        ValueError: a file that cannot be read as what it should be, or nothing to evaluate on.
        OSError: a file that cannot be read at all.
    """
    import torch

    from farl.evaluation.attributes_table import read_attributes
    from farl.evaluation.features import extract_features, spread_positions
    from farl.evaluation.provenance import describe_checkpoint, describe_data, describe_versions
    from farl.evaluation.retrieval import figures_of
    from farl.evaluation.zero_shot import zero_shot_attributes
    from farl.model import FaRL, load_pretrained
    from farl.tokenizer import pack
    from farl_engine.data import ShardIndex

    started = time.monotonic()
    attributes = read_attributes(options.attributes) if options.attributes else None
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and device.type != "cuda":
        raise ValueError("--device is cuda but torch sees no CUDA GPU; use --device cpu, or check the driver")
    model = load_pretrained(options.checkpoint)
    if options.untrained:
        torch.manual_seed(options.seed)
        model = FaRL(model.config)
    model = model.to(device)
    index = ShardIndex.build(options.data, progress=True)
    # A typing slip in the path of other shards should not cost the time of these.
    train_index = ShardIndex.build(options.probe_train) if options.probe_train else None
    features = extract_features(
        model,
        index,
        device=device,
        positions=spread_positions(len(index), options.max_pairs or None),
        tokenizer=pack,
        batch_size=options.batch_size,
        threads=options.threads,
        progress="encode pairs",
    )
    assert features is not None
    if not len(features.positions):
        raise ValueError(f"no pair of {options.data} can be read: {features.bad or 'the shards are empty'}")
    report: dict[str, Any] = {
        "checkpoint": describe_checkpoint(options.checkpoint, model) | {"untrained": options.untrained},
        "data": describe_data(options.data, index, features),
        "retrieval": figures_of(features, device=device),
    }
    if attributes is not None:
        keys = [index.key(int(i)) for i in features.positions]
        labels, matched, groups = _labels_of(attributes, keys)
        report["attributes"] = {
            "table": options.attributes,
            "names": attributes.names,
            "ignored_columns": attributes.ignored,
            "samples_with_labels": int(matched.sum()),
        }
        report["zero_shot"] = zero_shot_attributes(
            model, pack, features.image[matched], labels[matched], attributes.names, device=device
        )
        train = None
        if train_index is not None:
            train = extract_features(
                model,
                train_index,
                device=device,
                batch_size=options.batch_size,
                threads=options.threads,
                progress="encode images of the probe",
            )
            assert train is not None
        report["linear_probe"] = _probe(options, attributes, features, labels, matched, groups, train, train_index)
    report["versions"] = describe_versions(device)
    report["seconds"] = round(time.monotonic() - started, 2)
    return report


def _probe(
    options: EvaluateOptions,
    attributes: AttributeTable,
    features: Features,
    labels: torch.Tensor,
    matched: torch.Tensor,
    groups: list[str],
    train: Features | None,
    train_index: Any,
) -> dict[str, Any]:
    """Split, fit and judge. `groups` are people, or the keys themselves where the table names no people."""
    from farl.evaluation.attributes_table import hash_share
    from farl.evaluation.linear_probe import linear_probe
    from farl.evaluation.provenance import describe_data

    by = attributes.group_column or "key"
    if train is None:
        test_part = hash_share(groups, options.seed) < options.probe_test_share
        train_part = matched & ~test_part
        test_part &= matched
        train_groups = [group for group, chosen in zip(groups, train_part.tolist(), strict=True) if chosen]
        train_image, train_labels = features.image[train_part], labels[train_part]
        split = f"{options.probe_test_share:g} of --data tests, chosen by a hash of {by!r}"
    else:
        keys = [train_index.key(int(i)) for i in train.positions]
        train_labels, train_part, all_groups = _labels_of(attributes, keys)
        test_part = matched
        train_groups = [group for group, chosen in zip(all_groups, train_part.tolist(), strict=True) if chosen]
        train_image, train_labels = train.image[train_part], train_labels[train_part]
        split = "--probe-train fits, --data tests"
    test_groups = {group for group, chosen in zip(groups, test_part.tolist(), strict=True) if chosen}
    result = linear_probe(
        train_image,
        train_labels,
        features.image[test_part],
        labels[test_part],
        attributes.names,
        validation=hash_share(train_groups, options.seed + 1) < VALIDATION_SHARE,
    )
    about: dict[str, Any] = {
        "split": split,
        "train_images": len(train_image),
        "test_images": int(test_part.sum()),
        "groups": by,
        "groups_on_both_sides": len(test_groups & set(train_groups)),
    }
    if train is not None:
        about["train_data"] = describe_data(options.probe_train, train_index, train)
    return about | result


def _labels_of(attributes: AttributeTable, keys: list[str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Labels [N, A] (NaN without a row), bool [N] whether there is a row, and the group of each sample."""
    import torch

    from farl.evaluation.attributes_table import match_rows

    rows = match_rows(attributes, keys)
    matched = rows >= 0
    labels = attributes.labels[rows.clamp_min(0)].masked_fill(~matched[:, None], torch.nan)
    if attributes.groups is None:
        return labels, matched, keys
    groups = [attributes.groups[row] if row >= 0 else key for row, key in zip(rows.tolist(), keys, strict=True)]
    return labels, matched, groups


if __name__ == "__main__":
    cli.run(main, "farl.evaluate")
