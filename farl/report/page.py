"""The page of a run: key figures, curves, pictures. One file beside its pictures, without scripts or foreign links."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farl.evaluation.table import percent

Record = dict[str, Any]

# File name -> title and the sentence under it, in the order of the page.
PICTURES = {
    "curves.png": ("Curves", "From metrics.jsonl. Dashed: what guessing gives."),
    "caption_to_images.png": ("Captions and the images they find", "Queries are taken at equal distances, not chosen."),
    "image_to_captions.png": ("Images and the captions they find", "Green: the image's own caption."),
    "masked_patches.png": (
        "Masked patches and predicted tokens",
        "The masked branch sees the second column and says which visual token belongs to each hidden patch.",
    ),
}

_STYLE = """
:root { --ink: #1f2430; --muted: #6b7182; --line: #e4e6ec; --back: #f6f7fa; --card: #fff; --accent: #3565c9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
       Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .2rem; }
p { margin: 0 0 .9rem; color: var(--muted); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.figure b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.figure span { color: var(--muted); font-size: .86rem; display: block; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem 1.4rem;
          margin-top: 1.2rem; }
section img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--muted); font-weight: 600; }
details summary { cursor: pointer; font-weight: 600; }
code { font-size: .88rem; overflow-wrap: anywhere; white-space: normal; }
"""


def write_page(
    path: str | Path,
    *,
    title: str,
    training: Sequence[Record] = (),
    evaluation: Sequence[Record] = (),
    config: Record | None = None,
) -> Path:
    """Write the page and link those of the known pictures (see `PICTURES`) that lie in its folder.

    Args:
        path: of the page, usually RUN_DIR/report/index.html.
        training, evaluation: lines as `read_metrics` returns them.
        config: the settings of the run, shown folded.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_subtitle(training, config))}</p>"]
    if figures := key_figures(training, evaluation):
        cards = "".join(
            f'<div class="figure"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>'
            f"<span>{html.escape(note) or '&nbsp;'}</span></div>"
            for name, value, note in figures
        )
        parts.append(f'<div class="figures">{cards}</div>')
    trained_on = config is not None and config.get("eval_data") == ""
    for name, (heading, sentence) in PICTURES.items():
        if (path.parent / name).is_file():
            if trained_on and name != "curves.png":
                sentence += " These are training pairs: the run had no --eval-data."
            parts.append(
                f'<section><h2>{heading}</h2><p>{html.escape(sentence)}</p><a href="{name}">'
                f'<img src="{name}" alt="{heading}"></a></section>'
            )
    if evaluation:
        parts.append(_evaluation_table(evaluation))
    if config:
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td><code>{html.escape(_plain(value))}</code></td></tr>"
            for key, value in config.items()
        )
        parts.append(f"<section><details><summary>Settings</summary><table>{rows}</table></details></section>")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def key_figures(training: Sequence[Record], evaluation: Sequence[Record]) -> list[tuple[str, str, str]]:
    """(name, value, note) of the figures that sum up a run; those that its log lacks are left out."""
    figures: list[tuple[str, str, str]] = []
    if evaluation:
        last = evaluation[-1]
        chance = last.get("chance_r1")
        note = f"chance {percent(chance)}" if chance is not None else ""
        for key, name in (("image_to_text_r1", "image to text"), ("text_to_image_r1", "text to image")):
            if key in last:
                times = f", {last[key] / chance:.0f} times that" if chance else ""
                figures.append((f"Held-out R@1, {name}", percent(last[key]), note + times))
    if training:
        first, last = training[0], training[-1]
        for key, name in (
            ("loss", "Loss"),
            ("loss_contrastive", "Contrastive loss"),
            ("loss_mim", "Masked-token loss"),
        ):
            if _finite(last.get(key)):
                since = f"from {first[key]:.3f} at step {first['step']}" if _finite(first.get(key)) else ""
                figures.append((name, f"{last[key]:.3f}", since))
        if _finite(last.get("accuracy_mim")):
            figures.append(("Masked tokens right", percent(last["accuracy_mim"]), "of those hidden"))
        # The first line holds the warming-up of the machine.
        rates = [r["pairs_per_second"] for r in training[1:] or training if _finite(r.get("pairs_per_second"))]
        if rates:
            waits = [r["data_wait_fraction"] for r in training[1:] or training if _finite(r.get("data_wait_fraction"))]
            note = f"{percent(sum(waits) / len(waits))} of the time waiting for data" if waits else ""
            stages = Counter(r["loader"]["bottleneck"] for r in training[1:] if isinstance(r.get("loader"), dict))
            stage = stages.most_common(1)[0][0] if stages else "step"
            note += f", mostly for its {stage.replace('_', ' ')}" if note and stage != "step" else ""
            figures.append(("Pairs a second", f"{sorted(rates)[len(rates) // 2]:,.0f}", note))
        if _finite(last.get("mfu")) and last["mfu"] > 0:
            figures.append(("Model FLOPs utilisation", percent(last["mfu"]), "of the GPU's bf16 peak"))
        if _finite(last.get("memory_bytes")):
            figures.append(("Memory", f"{last['memory_bytes'] / 2**30:.1f} GiB", "peak of one process"))
        if _finite(last.get("bad_samples")):
            figures.append(("Bad samples", f"{last['bad_samples']:,.0f}", "replaced and counted"))
    return figures


def _subtitle(training: Sequence[Record], config: Record | None) -> str:
    words = []
    if config and isinstance(config.get("model"), str):
        words.append(config["model"])
    if training:
        words.append(f"{training[-1]['step']:,} steps")
        if _finite(training[-1].get("samples")):
            words.append(f"{training[-1]['samples']:,.0f} pairs seen")
    return ", ".join(words) or "No log line yet."


def _evaluation_table(evaluation: Sequence[Record]) -> str:
    keys = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    shown = evaluation if len(evaluation) <= 12 else [*evaluation[:: -(-len(evaluation) // 11)], evaluation[-1]]
    rows = []
    seen: set[int] = set()
    for record in shown:
        if record["step"] not in seen:
            seen.add(record["step"])
            cells = "".join(f"<td>{percent(record.get(key))}</td>" for key in keys)
            rows.append(f"<tr><td>step {record['step']:,}</td>{cells}</tr>")
    last = evaluation[-1]
    chance = "".join(f"<td>{percent(last.get(f'chance_r{k}'))}</td>" for _ in range(2) for k in (1, 5, 10))
    heads = "".join(f"<th>{way} R@{k}</th>" for way in ("I→T", "T→I") for k in (1, 5, 10))
    about = f"{last['pairs']:,} pairs" if "pairs" in last else ""
    if "distinct_captions" in last:
        about += (
            f", {last['distinct_captions']:,} different captions; equal captions count as one, ties against the model"
        )
    return (
        f"<section><h2>Held-out retrieval</h2><p>{html.escape(about)}</p>"
        f'<div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(rows)}<tr><td>chance</td>{chance}</tr></table>'
        "</div></section>"
    )


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
