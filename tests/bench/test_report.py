"""The page of benchmarks says what the files say, and "not measured" where they say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.results import load
from bench.tables import breakdown, duration, missing, short_table, table

SHAPE = "197 tokens"


def time(contender: str, mode: str, seconds: float, **others: Any) -> dict[str, Any]:
    labels = {"op": "attention", "shape": SHAPE, "mode": mode, "contender": contender}
    return {"extra_info": labels | {"seconds": seconds, "timed": "graph replay", "floor_seconds": 1e-4} | others}


def write(path: Path, benchmarks: list[dict[str, Any]], date: str = "2026-01-01", **others: Any) -> None:
    machine = {"device": "A GPU", "capability": "9.0", "commit": {"id": "0123456789abcdef", "dirty": None}}
    content = {
        "machine_info": {"farl": machine | {"versions": {"torch": "2.11.0"}, "driver_version": "580"}},
        "ceilings": {"bytes_per_second": 4.3e12, "flop_per_second": 7.9e14, "gemm": "8192^3", "copy": "2 GiB"},
        "datetime": date,
        "benchmarks": benchmarks,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | others))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    left = {"op": "attention", "shape": SHAPE, "contender": "xformers", "reason": "xformers is not installed"}
    write(
        tmp_path / "results" / "a-gpu" / "attention.json",
        [
            time("farl_kernels triton", "both", 2e-4, errors={"gradient 0": 3e-3}, peak_bytes=5 << 20),
            time("farl_kernels triton", "forward", 5e-5),
            time("SDPA, cuDNN", "both", 5e-4, timed="calls in a loop", not_captured="error"),
            time("SDPA, flash", "both", 6e-4),
            time("SDPA, flash", "forward", 1e-4),
        ],
        not_measured=[left | {"mode": mode} for mode in ("both", "forward")]
        + [{**left, "contender": "SDPA, cuDNN", "mode": "forward", "reason": "out of time"}],
    )
    return tmp_path / "results" / "a-gpu"


def test_a_table_compares_with_the_best_peer(folder: Path) -> None:
    lines = table(load(folder), "attention", SHAPE)
    head, ours, cudnn, flash = (lines[index] for index in (2, 4, 5, 6))
    assert head == (
        "|  | forward | forward + backward | against the best peer | of the ceiling | peak memory | largest error |"
    )
    assert ours == "| **farl_kernels triton** | 50 µs | 200 µs | 2.50x | 50 % | 5 MiB | 3.0e-03 |"
    assert cudnn == "| SDPA, cuDNN | not measured | 500 µs° | 1.00x | 20 % | not measured | not measured |"
    assert flash.startswith("| SDPA, flash | 100 µs | 600 µs | 0.83x | 17 % |")


def test_what_has_no_time_is_named_with_its_reason(folder: Path) -> None:
    lines = missing(load(folder), "attention")
    assert "- not measured: xformers: xformers is not installed" in lines
    assert "- not measured: SDPA, cuDNN (forward): out of time" in lines


def test_the_newer_of_two_files_counts(folder: Path) -> None:
    write(folder / "again.json", [time("farl_kernels triton", "both", 1e-4)], date="2026-02-01")
    write(folder / "before.json", [time("SDPA, flash", "both", 1e-9)], date="2025-01-01")
    results = load(folder)
    found = {name: results.time("attention", SHAPE, "both", name) for name in ("farl_kernels triton", "SDPA, flash")}
    assert [time.seconds for time in found.values() if time] == [1e-4, 6e-4]


def test_a_time_takes_the_place_of_an_earlier_reason(folder: Path) -> None:
    write(folder / "again.json", [time("xformers", "both", 1e-3), time("xformers", "forward", 1e-3)], date="2026-02-01")
    assert not any("xformers" in line for line in missing(load(folder), "attention"))


def test_the_summary_has_a_line_a_shape(folder: Path) -> None:
    (line,) = short_table(load(folder))
    assert line == (
        "attention | 197 tokens | both: farl_kernels triton 200 µs, SDPA, cuDNN 500 µs, 2.50x, 50 % of the ceiling"
    )


def test_the_page_has_provenance_tables_and_pictures(folder: Path, tmp_path: Path) -> None:
    steps = [{"title": "kernel tests", "status": "ok", "counts": {"passed": 7, "failed": 0}, "line": "", "seconds": 1}]
    steps += [{"title": "sanitizer", "status": "not measured", "counts": {}, "line": "no tool", "seconds": 0}]
    (folder / "correctness.json").write_text(json.dumps({"section": "correctness", "steps": steps}))
    out = tmp_path / "docs" / "benchmarks.md"
    assert report.main(["--results", str(folder.parent), "--out", str(out)]) == 0
    text = out.read_text()
    assert "## A GPU" in text and "Commit: `0123456789ab`" in text and "4,300 GB/s copied, 790 TFLOP/s" in text
    assert "| kernel tests | ok | 7 passed" in text and "| sanitizer | not measured: no tool |" in text
    assert "## On a GPU" not in text
    picture = tmp_path / "docs" / "images" / "bench-a-gpu-attention.png"
    assert f"![attention](images/{picture.name})" in text and picture.read_bytes().startswith(b"\x89PNG")


def test_loaders_have_rates_ratios_and_facts(folder: Path, tmp_path: Path) -> None:
    rows = [("farl_engine", 0.02, [1.0, 1.0, 1.0]), ("webdataset", 0.06, [3.0, 2.8, 3.25])]
    benchmarks = []
    for name, seconds, ratio in rows:
        made = time(name, "both", seconds, pictures_per_second=32 / seconds, times_ours=ratio, floor_seconds=0.0)
        made["extra_info"] |= {"op": "loader", "shape": "made"}
        benchmarks.append(made)
    facts = [{"op": "loader", "text": "Bad samples cost nothing."}, {"op": "decoding", "text": "Memory is flat."}]
    write(folder / "loader.json", benchmarks, facts=facts)
    lines = table(load(folder), "loader", "made")
    assert lines[2] == "|  | time | pictures/s | time over ours, in turns | against the best peer |"
    assert lines[5] == "| webdataset | 60 ms | 533 | 3.00 (2.80 to 3.25) | 1.00x |"
    out = tmp_path / "docs" / "benchmarks.md"
    report.main(["--results", str(folder.parent), "--out", str(out)])
    text = out.read_text()
    assert "- Bad samples cost nothing." in text.split("### Loader")[1]
    assert "- Memory is flat." in text.split("### Decoding")[1]


def whole_steps(folder: Path, **more: Any) -> Path:
    """Results of a step of three contenders; the peer's compiled form could not be counted."""
    parts = [
        {"part": "image tower", "forward": 0.3, "backward": 0.5, "floor": 0.4},
        {"part": "masks", "forward": 0.001, "backward": 0.0, "floor": None},
        {"part": "optimizer", "forward": 0.195, "backward": 0.0, "floor": None},
        {"part": "other", "forward": 0.004, "backward": 0.0, "floor": None},
    ]
    told: dict[str, dict[str, Any]] = {
        "farl": {
            "seconds": 1.0,
            "flop_computed": 1.1e12,
            "parts": parts,
            "parts_seconds": 1.0,
            "peak_bytes": 5 << 30,
            "predicted_bytes": 4 << 30,
        },
        "peer": {"seconds": 2.0, "flop_computed": 2.4e12, "peak_bytes": 9 << 30},
        "peer, torch.compile": {"seconds": 1.6, "flop_computed": None, "first_call_seconds": 61.0},
    }
    rows = []
    for name, info in told.items():
        made = time(name, "both", 0.0, flop=1e12, pairs_per_second=64 / info["seconds"], **more)
        made["extra_info"] |= info | {"op": "whole step", "shape": "small", "floor_seconds": 0.0}
        rows.append(made)
    write(folder / "step.json", rows)
    return folder


def test_whole_steps_tell_useful_and_all_products(folder: Path) -> None:
    lines = table(load(whole_steps(folder)), "whole step", "small")
    assert lines[2] == (
        "|  | time | pairs/s | against the best peer | useful GFLOP/s | all GFLOP/s | peak memory | first call |"
    )
    assert lines[4] == "| **farl** | 1 s | 64 | 1.60x | 1,000 | 1,100 | 5,120 MiB (4,096 MiB predicted) |  |"
    assert lines[5] == ("| peer, torch.compile | 1.6 s | 40 | 1.00x | 625 | not measured | not measured | 61 s |")


def test_on_a_gpu_they_are_shares_of_its_peak(folder: Path) -> None:
    lines = table(load(whole_steps(folder, peak_flop_per_second=2e12)), "whole step", "small")
    assert "| MFU | HFU |" in lines[2] and "| 50 % | 55 % |" in lines[4] and "| 25 % | 60 % |" in lines[6]


def test_the_parts_of_a_step_are_shown(folder: Path, tmp_path: Path) -> None:
    lines = breakdown(load(whole_steps(folder)), "whole step", "small")
    assert lines[4:] == [
        "| image tower | 300 ms | 500 ms | 80 % | 400 ms |",
        "| optimizer | 195 ms |  | 20 % |  |",
        "| all others | 5 ms | | 0 % | |",
        "",
    ]
    assert not breakdown(load(folder), "attention", SHAPE)
    out = tmp_path / "docs" / "benchmarks.md"
    report.main(["--results", str(folder.parent), "--out", str(out)])
    assert "\n".join(lines[:6]) in out.read_text()


def test_without_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.md"
    assert report.main(["--results", str(tmp_path / "none"), "--out", str(out)]) == 0
    assert out.read_text().count("Not measured.") == 2
    assert "0." not in out.read_text().split("## On a GPU")[1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (2e-6, "2 µs"), (5e-8, "0.05 µs"), (1234.0, "1,234 s")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
