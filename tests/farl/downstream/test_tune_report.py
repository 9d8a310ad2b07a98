"""The table that a run prints at its end."""

from __future__ import annotations

from typing import Any

from farl.downstream.tune_report import result_table


def result(metric: str, last: dict[str, float | None], best: dict[str, float | None]) -> dict[str, Any]:
    return {
        "main_metric": metric,
        "last": {"step": 40, "epoch": 10, "metrics": last},
        "best": {"step": 30, "epoch": 7.5, "metrics": best},
        "data": {"test": {"samples": 1200}},
    }


def test_parsing_has_a_row_a_class() -> None:
    last = {
        "mean_iou": 0.8,
        "mean_f1": 0.9,
        "f1/skin": 0.95,
        "f1/left_brow": 0.85,
        "iou/skin": 0.9,
        "iou/left_brow": 0.7,
    }
    best = {name: value + 0.01 for name, value in last.items()}
    assert result_table(result("mean_f1", last, best)) == (
        "               last       best\n"
        "epoch            10        7.5\n"
        "mean_f1      0.9000     0.9100\n"
        "mean_iou     0.8000     0.8100\n"
        "\n"
        "                       f1             iou\n"
        "             last    best    last    best\n"
        "skin       0.9500  0.9600  0.9000  0.9100\n"
        "left_brow  0.8500  0.8600  0.7000  0.7100\n"
        "best is chosen on the test set; last is the fair one"
    )


def test_attributes_have_one_column_for_what_the_labels_alone_decide() -> None:
    last = {
        "mean_accuracy": 0.8,
        "accuracy/hat": 0.9,
        "accuracy/smile": 0.7,
        "positives/hat": 0.1,
        "positives/smile": 0.5,
    }
    last |= {"ap/hat": None, "ap/smile": 0.6}
    best = last | {"mean_accuracy": 0.85, "accuracy/smile": 0.8, "ap/smile": 0.65}
    told = result("mean_accuracy", last, best) | {"test_samples_in_train": 1200}
    assert result_table(told) == (
        "                    last       best\n"
        "epoch                 10        7.5\n"
        "mean_accuracy     0.8000     0.8500\n"
        "\n"
        "             accuracy  positives              ap\n"
        "         last    best       both    last    best\n"
        "hat    0.9000  0.9000     0.1000       -       -\n"
        "smile  0.7000  0.8000     0.5000  0.6000  0.6500\n"
        "best is chosen on the test set; last is the fair one\n"
        "1,200 of 1,200 test samples are in --train too: neither is fair"
    )


def test_alignment_has_a_row_a_subset_and_no_table_without_them() -> None:
    last = {"nme_box": 0.03, "nme_diagonal": 0.01, "nme_box/frontal": 0.02, "nme_diagonal/frontal": 0.009}
    table = result_table(result("nme_diagonal", last, last)).splitlines()
    assert table[2].split() == ["nme_diagonal", "0.0100", "0.0100"]
    assert table[4:-1] == [
        "",
        "         nme_box  nme_diagonal",
        "            both          both",
        "frontal   0.0200        0.0090",
    ]
    whole = {name: value for name, value in last.items() if "/" not in name}
    assert len(result_table(result("nme_diagonal", whole, whole)).splitlines()) == 5
