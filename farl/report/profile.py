"""What --profile found, for people: a page of tables, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from farl.profiling import PARTS, Profile, Row
from farl.report.style import BLUE, FAINT, INK, MUTED, ORANGE, look, save

LONGEST = 15
# A part with a smaller share of the update is in the table alone.
SMALLEST_DRAWN = 0.001


def profile_table(profile: Profile) -> str:
    """The page, in Markdown; profile.png and trace.json.gz lie beside it."""
    found, seconds = profile.recording, profile.seconds
    device = found.breakdown.device
    plain = f" Without the profiler one took {_ms(found.plain_seconds)} ms." if found.plain_seconds else ""
    above = f", {_ratio(seconds, profile.floor)} times its floor of {_ms(profile.floor)} ms" if profile.floor else ""
    lines = [
        "# Where the time of an update went",
        "",
        f"{profile.device}, `--engine {profile.engine}`, {profile.pairs:,} pairs a process; the mean of "
        f"{found.breakdown.updates} updates of the first process, after step {found.first_step:,}.",
        "",
        f"**An update took {_ms(seconds)} ms{above}** ({profile.pairs / seconds:,.0f} pairs/s a process).{plain}",
        "",
        f"Most to gain: {', '.join(_gain(row) for row in _gains(profile)[:4])}.",
        "",
        "![parts of an update and their floors](profile.png)",
        "",
        *_parts(profile),
        "",
        *_explanation(profile),
        "",
    ]
    if device is not None:
        waits = ", ".join(f"{name} {_count(count)}" for name, count in device.host_syncs.items())
        lines += [
            "## The device",
            "",
            f"At work {_ms(device.busy)} ms of an update, idle {_ms(device.idle)} ms ({device.idle / seconds:.1%}). "
            f"{_count(device.launches)} kernels an update. "
            f"The host waited for it {_count(sum(device.host_syncs.values()))} times{f' ({waits})' if waits else ''}.",
            "",
            "| kernel | calls | ms |",
            "|---|---:|---:|",
            *(_line(_code(k.name), _count(k.calls), _ms(k.seconds)) for k in device.kernels[:LONGEST]),
            "",
        ]
    lines += ["## The longest ops", "", "Without the ops that they call; calls and times are those of an update.", ""]
    if device is None:
        lines += ["| op | calls | ms | share |", "|---|---:|---:|---:|"]
        for op in found.breakdown.ops[:LONGEST]:
            lines.append(_line(_code(op.name), _count(op.calls), _ms(op.host), f"{op.host / seconds:.1%}"))
    else:
        lines += ["| op | calls | its kernels, ms | host, ms |", "|---|---:|---:|---:|"]
        for op in found.breakdown.ops[:LONGEST]:
            lines.append(_line(_code(op.name), _count(op.calls), _ms(op.device), _ms(op.host)))
    lines += ["", f"Every single one: open `{found.trace.name}` at https://ui.perfetto.dev.", ""]
    return "\n".join(lines)


def _parts(profile: Profile) -> list[str]:
    device = profile.recording.breakdown.device is not None
    lines = [
        "| part | what | forward or all, ms | backward, ms | together | share | floor, ms | times its floor |"
        + (" host, ms |" if device else ""),
        "|---|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if device else ""),
    ]
    for row in profile.rows:
        floor, ratio = ("", "") if row.floor is None else (_ms(row.floor), _ratio(row.seconds, row.floor))
        cells = [row.part, PARTS.get(row.part, ""), _ms(row.forward), _ms(row.backward) if row.backward else ""]
        cells += [_ms(row.seconds), f"{row.seconds / profile.seconds:.1%}", floor, ratio]
        lines.append(_line(*cells, *([_ms(row.host)] if device else [])))
    total = sum(row.seconds for row in profile.rows)
    ratio = _ratio(total, profile.floor) if profile.floor else ""
    sums = [sum(getattr(row, name) for row in profile.rows) for name in ("forward", "backward")]
    cells = ["**update**", "", *map(_ms, sums), _ms(total), f"{total / profile.seconds:.1%}", _ms(profile.floor), ratio]
    lines.append(_line(*cells, *([""] if device else [])))
    return lines


def _explanation(profile: Profile) -> list[str]:
    ceilings = profile.ceilings
    without = ", ".join(row.part for row in profile.rows if row.floor is None)
    lines = [
        "A part's floor is the least time that this machine needs for the matrix products it cannot do without "
        f"(at {ceilings.flop_per_second / 1e9:,.0f} GFLOP/s, that of one large product in {ceilings.dtype}) or for its "
        f"bytes (at {ceilings.bytes_per_second / 1e9:,.1f} GB/s, a copy of as many numbers as the model has), "
        "whichever is longer; both rates were measured when the run started. Recomputed activations, padding and the "
        "second pass of micro-batches count as time, not as floor.",
        "",
        f"Without a floor, for want of products or of bytes that can be counted: {without}.",
    ]
    if profile.recording.breakdown.device is not None:
        lines += [
            "",
            "Forward and backward are times of the device. A moment in which two things run counts for the "
            "computation, not for the copy or the exchange beside it. *Host* is what the host took to start the work, "
            "mostly beside it: where it is the longer of the two, the device waits for the host.",
        ]
    return lines


def draw_profile(profile: Profile, path: str | Path) -> Path:
    """A bar for each part, forward and backward stacked, with its floor."""
    rows = [row for row in profile.rows if row.seconds >= SMALLEST_DRAWN * profile.seconds][::-1]
    with look():
        figure = Figure(figsize=(10, 1.3 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        forward = [1e3 * row.forward for row in rows]
        colors = [MUTED if row.floor is None else BLUE for row in rows]
        axes.barh(places, forward, color=colors, height=0.62)
        axes.barh(places, [1e3 * row.backward for row in rows], left=forward, color=ORANGE, height=0.62)
        longest = 1e3 * max((max(row.seconds, row.floor or 0.0) for row in rows), default=1.0)
        for place, row in zip(places, rows, strict=True):
            if row.floor is not None:
                axes.plot([1e3 * row.floor] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2.4)
            end = 1e3 * max(row.seconds, row.floor or 0.0) + 0.012 * longest
            ratio = f",  {_ratio(row.seconds, row.floor)} x floor" if row.floor else ""
            text = f"{_ms(row.seconds)} ms  ({row.seconds / profile.seconds:.1%}){ratio}"
            axes.text(end, place, text, va="center", fontsize=9, color=MUTED)
        axes.set_yticks(places, [row.part for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlim(0, 1.32 * longest)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=FAINT)
        axes.set_xlabel("ms an update" + (" on the device" if profile.recording.breakdown.device else ""))
        floor = f", floor {_ms(profile.floor)} ms" if profile.floor else ""
        axes.set_title(f"{_ms(profile.seconds)} ms an update{floor}   ({profile.device}, {profile.pairs:,} pairs)")
        keys = [
            Patch(color=BLUE, label="forward, or all of it"),
            Patch(color=ORANGE, label="backward"),
            Line2D([], [], color=INK, linewidth=2.4, label="floor of both"),
            Patch(color=MUTED, label="without a floor"),
        ]
        axes.legend(handles=keys, loc="lower right")
        return save(figure, path)


def _gains(profile: Profile) -> Sequence[Row]:
    return sorted(profile.rows, key=lambda row: (row.floor or 0.0) - row.seconds)


def _gain(row: Row) -> str:
    if row.floor is None:
        return f"{row.part} {_ms(row.seconds)} ms"
    return f"{row.part} {_ms(row.seconds - row.floor)} ms above its floor"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _code(name: str) -> str:
    # The names of some kernels are whole signatures.
    short = name if len(name) <= 80 else f"{name[:77]}..."
    return f"`{short.replace('|', '/').replace('`', '')}`"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    if 0 < value < 0.0005:
        return "< 0.001"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _ratio(seconds: float, floor: float) -> str:
    return f"{seconds / floor:,.0f}" if seconds >= 10 * floor else f"{seconds / floor:.1f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"
