"""The report of `farl.evaluate` as a table for a person."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any


def report_table(report: dict[str, Any]) -> str:
    """What `farl.evaluate.evaluate` returns, in lines of at most about 120 characters."""
    retrieval = report["retrieval"]
    distinct = retrieval["distinct"]
    lines = [
        f"{retrieval['pairs']:,} pairs, {retrieval['distinct_captions']:,} different captions "
        f"(the most frequent one {retrieval['largest_caption_group']:,} times)"
    ]
    problems = Counter(report["data"]["problems"]) + Counter(report["data"]["bad"])
    if problems:
        lines.append(
            "problems in the data: " + ", ".join(f"{cause} {count:,}" for cause, count in sorted(problems.items()))
        )
    lines += ["", f"{'retrieval':<40}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>13}"]
    for figures, ways in (
        (retrieval, ("image to text", "text to image")),
        (distinct, ("image to different captions", "different captions to image")),
    ):
        for way, name in zip(("image_to_text", "text_to_image"), ways, strict=True):
            recalls = [percent(figures[f"{way}_r{k}"]) for k in (1, 5, 10)]
            lines.append(_row(name, recalls, figures[f"{way}_median_rank"]))
            prefix = "" if figures is retrieval else f"{way}_"
            lines.append(_row("  chance", [percent(figures[f"{prefix}chance_r{k}"]) for k in (1, 5, 10)]))
    lines.append("A hit is any item with an equal caption (case and white space aside); " + retrieval["ties"] + ".")
    if "zero_shot" in report:
        lines += ["", *_attribute_lines(report["zero_shot"], report["linear_probe"])]
    return "\n".join(lines)


def _attribute_lines(zero_shot: dict[str, Any], probe: dict[str, Any]) -> list[str]:
    lines = [
        f"{'':<24}{'zero-shot':^24}{'linear probe':^40}",
        f"{'attribute':<24}{'balanced':>8}{'AP':>8}{'chance':>8}"
        f"{'accuracy':>10}{'majority':>10}{'balanced':>10}{'AP':>8}{'chance':>8}",
    ]
    rows = [*((name, zero_shot["attributes"].get(name, {}), figures) for name, figures in probe["attributes"].items())]
    for name, prompts, fitted in [*rows, ("mean", zero_shot["mean"], probe["mean"])]:
        left = [prompts.get(key) for key in ("balanced_accuracy", "average_precision", "chance_average_precision")]
        lines.append(
            f"{name[:23]:<24}"
            + "".join(f"{percent(value):>8}" for value in left)
            + "".join(f"{percent(fitted[key]):>10}" for key in ("accuracy", "majority_accuracy", "balanced_accuracy"))
            + "".join(f"{percent(fitted[key]):>8}" for key in ("average_precision", "chance_average_precision"))
        )
    lines.append("Chance is 50 % for balanced accuracy and the share of positives for average precision (AP).")
    shared = f"{probe['groups_on_both_sides']:,} values of {probe['groups']!r} on both sides"
    lines.append(
        f"Probe: {probe['train_images']:,} images fit, {probe['test_images']:,} test ({probe['split']}); {shared}."
    )
    return lines


def _row(name: str, values: list[str], median: float | None = None) -> str:
    end = "" if median is None else f"{median:>13,.0f}"
    return f"{name:<40}" + "".join(f"{value:>8}" for value in values) + end


def percent(value: float | None) -> str:
    """A share such as 0.1234 as "12.3 %", small ones with two digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if value >= 0.0095 or value == 0 else f"{100 * value:.2g} %"
