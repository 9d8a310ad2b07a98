"""Results as text: Markdown tables for the documentation, a short table for the end of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.results import Key, Result, Results, is_ours

NOT_MEASURED = "not measured"
# A smaller share of a step has no row of its own.
SMALL_PART = 0.005
MODE_HEADS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def main_mode(results: Results, op: str, shape: str) -> str | None:
    """The mode that matters of those measured: "both" where there is one."""
    modes = results.modes(op, shape)
    return modes[-1] if modes else None


def best_peer(results: Results, op: str, shape: str, mode: str) -> Result | None:
    peers = [name for name in results.contenders(op, shape) if not is_ours(name)]
    found = [time for name in peers if (time := results.time(op, shape, mode, name)) is not None]
    return min(found, key=lambda time: time.seconds, default=None)


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:,.0f} {unit}"
    raise AssertionError


def ratio(value: float) -> str:
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 1024:,.0f} KiB"


def table(results: Results, op: str, shape: str) -> list[str]:
    """A Markdown table of all contenders that have a time at one shape."""
    modes = results.modes(op, shape)
    contenders = results.contenders(op, shape)
    lines = [f"**{shape}**", ""]
    shown = [name for name in contenders if any(results.time(op, shape, mode, name) for mode in modes)]
    if not shown:
        lines += [NOT_MEASURED, ""]
    else:
        columns = _columns(results, op, shape, shown)
        lines.append("| " + " | ".join(["", *columns]) + " |")
        lines.append("|---|" + "---:|" * len(columns))
        for name in shown:
            cells = [columns[head].get(name, NOT_MEASURED) for head in columns]
            lines.append(f"| {'**' + name + '**' if is_ours(name) else name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def missing(results: Results, op: str) -> list[str]:
    """One line for each reason for which contenders have no time, with the shapes and modes where not all lack it."""
    keys = [key for key in [*results.times, *results.missing] if key[0] == op]
    found: dict[str, dict[str, list[Key]]] = {}
    for key, reason in results.missing.items():
        if key[0] == op:
            found.setdefault(_short(reason), {}).setdefault(key[3], []).append(key)
    lines = []
    for reason, contenders in found.items():
        names = []
        for contender, lacking in contenders.items():
            where: list[str] = []
            for part in (1, 2):
                those, all_of = ({key[part] for key in group} for group in (lacking, _of(keys, contender)))
                if those != all_of:
                    where += sorted(those)
            names.append(contender + (f" ({'; '.join(where)})" if where else ""))
        lines.append(f"- {NOT_MEASURED}: {', '.join(names)}: {reason}")
    return [*lines, ""] if lines else []


def _of(keys: list[Key], contender: str) -> list[Key]:
    return [key for key in keys if key[3] == contender]


def _columns(results: Results, op: str, shape: str, shown: list[str]) -> dict[str, dict[str, str]]:
    """Head -> contender -> cell. Columns that nobody has anything for are left out."""
    mode = main_mode(results, op, shape)
    assert mode is not None
    times = {name: results.time(op, shape, mode, name) for name in shown}
    found = {name: time for name, time in times.items() if time is not None}
    peer = best_peer(results, op, shape, mode)
    columns: dict[str, dict[str, str]] = {}
    for each in results.modes(op, shape):
        of_mode = ((name, results.time(op, shape, each, name)) for name in shown)
        columns[MODE_HEADS[each]] = {
            name: duration(time.seconds) + ("" if _graph(time) else "°") for name, time in of_mode if time is not None
        }
    if op.startswith("whole step") or (mode == "both" and "pictures_per_second" in next(iter(found.values())).info):
        columns = {"time": next(iter(columns.values()))}
    rates = (("pairs_per_second", "pairs/s"), ("pictures_per_second", "pictures/s"))
    for key, head in rates:
        columns[head] = {name: f"{time.info[key]:,.0f}" for name, time in found.items() if key in time.info}
    waits = {name: time.info["data_wait_fraction"] for name, time in found.items() if "data_wait_fraction" in time.info}
    columns["waits for data"] = {name: f"{100 * share:.1f} %" for name, share in waits.items()}
    turns = {name: time.info["times_ours"] for name, time in found.items() if "times_ours" in time.info}
    columns["time over ours, in turns"] = {
        name: "" if value == [1.0, 1.0, 1.0] else "{:.2f} ({:.2f} to {:.2f})".format(*value)
        for name, value in turns.items()
    }
    if peer is not None:
        columns["against the best peer"] = {name: ratio(peer.seconds / time.seconds) for name, time in found.items()}
    columns |= _utilisation(found)
    bound = {name: time.info["floor_seconds"] / time.seconds for name, time in found.items() if _floored(time)}
    columns["of the ceiling"] = {name: f"{100 * share:.0f} %" for name, share in bound.items()}
    columns["peak memory"] = {name: _peak(time) for name, time in found.items() if "peak_bytes" in time.info}
    first = {name: time.info["first_call_seconds"] for name, time in found.items() if _compiled(time)}
    columns["first call"] = {name: duration(first[name]) if name in first else "" for name in found if first}
    errors = {name: max(time.info["errors"].values()) for name, time in found.items() if time.info.get("errors")}
    columns["largest error"] = {name: f"{error:.1e}" for name, error in errors.items()}
    return {head: cells for head, cells in columns.items() if cells}


def _utilisation(found: dict[str, Result]) -> dict[str, dict[str, str]]:
    """Products that a step needs and products that it takes: as shares of the GPU's peak, or rates where none is known.

    Of a contender whose products could not be counted only the first is told.
    """
    told = {name: time for name, time in found.items() if "flop_computed" in time.info}
    if not told:
        return {}
    peaked = all("peak_flop_per_second" in time.info for time in told.values())

    def cells(key: str) -> dict[str, str]:
        rates = {name: time.info[key] / time.seconds for name, time in told.items() if time.info[key] is not None}
        if peaked:
            return {
                name: f"{100 * rate / told[name].info['peak_flop_per_second']:.0f} %" for name, rate in rates.items()
            }
        return {name: f"{rate / 1e9:,.0f}" for name, rate in rates.items()}

    heads = ("MFU", "HFU") if peaked else ("useful GFLOP/s", "all GFLOP/s")
    return {heads[0]: cells("flop"), heads[1]: cells("flop_computed")}


def _compiled(time: Result) -> bool:
    return "torch.compile" in time.contender and "first_call_seconds" in time.info


def _peak(time: Result) -> str:
    predicted = time.info.get("predicted_bytes")
    return size(time.info["peak_bytes"]) + (f" ({size(predicted)} predicted)" if predicted else "")


def breakdown(results: Results, op: str, shape: str) -> list[str]:
    """A Markdown table of the seconds of a step by part, for each contender that has them."""
    lines: list[str] = []
    mode = main_mode(results, op, shape)
    for name in results.contenders(op, shape):
        time = results.time(op, shape, mode, name) if mode is not None else None
        if time is None or "parts" not in time.info:
            continue
        whole = time.info["parts_seconds"]
        lines += [f"Parts of the step of {name} ({duration(whole)} under the profiler):", ""]
        lines += ["| part | forward | backward | of the step | least time |", "|---|---:|---:|---:|---:|"]
        rest = 0.0
        for part in time.info["parts"]:
            seconds = part["forward"] + part["backward"]
            if seconds < SMALL_PART * whole or part["part"] == "other":
                rest += seconds
                continue
            times = [duration(part[key]) if part[key] else "" for key in ("forward", "backward", "floor")]
            lines.append(f"| {part['part']} | {times[0]} | {times[1]} | {100 * seconds / whole:.0f} % | {times[2]} |")
        lines += [f"| all others | {duration(rest)} | | {100 * rest / whole:.0f} % | |", ""]
    return lines


def _graph(time: Result) -> bool:
    # A CPU has no graphs: there the mark would say nothing.
    return time.info.get("timed") == "graph replay" or time.info.get("not_captured") is None


def _floored(time: Result) -> bool:
    return time.info.get("floor_seconds", 0.0) > 0


def _short(reason: str) -> str:
    reason = re.sub(r"^ValueError: \w+: backend '(\w+)' cannot run this call: ", r"\1 refuses: ", reason)
    reason = re.sub(r"^ValueError: \w+: (backend '\w+' is not one of) .*$", r"\1 this op's", reason)
    return reason if len(reason) <= 160 else reason[:157] + "..."


def short_table(results: Results) -> list[str]:
    """One line for each op and shape: our best and the best peer."""
    lines: list[str] = []
    for op, shape in _pairs(results):
        mode = main_mode(results, op, shape)
        if mode is None:
            lines.append(f"{op} | {shape}: {NOT_MEASURED}")
            continue
        names = [name for name in results.contenders(op, shape) if is_ours(name)]
        ours = [time for name in names if (time := results.time(op, shape, mode, name)) is not None]
        peer = best_peer(results, op, shape, mode)
        best = min(ours, key=lambda time: time.seconds, default=None)
        told = [f"{time.contender} {duration(time.seconds)}" for time in (best, peer) if time is not None]
        if best is not None and peer is not None:
            told.append(ratio(peer.seconds / best.seconds))
        if best is not None and _floored(best):
            told.append(f"{100 * best.info['floor_seconds'] / best.seconds:.0f} % of the ceiling")
        lines.append(f"{op} | {shape} | {mode}: " + ", ".join(told))
    return lines


def _pairs(results: Results) -> Iterable[tuple[str, str]]:
    return ((op, shape) for op in results.ops for shape in results.shapes(op))
