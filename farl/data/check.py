"""`python -m farl.data check SHARDS`: what shards hold, and which samples training would have to replace."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from farl import cli
from farl.data.figures import figures_of, table
from farl.data.tally import Tally
from farl.progress import Progress

if TYPE_CHECKING:
    from farl.data.probe import Prober
    from farl_engine.data import ShardIndex

PROG = "farl.data check"
DESCRIPTION = """Counts what shards hold: samples, bad ones by cause, sizes, captions, kinds of JPEG, fingerprint.

Reads the header of every image, and with --decode every pixel. Of more than 100,000 samples it looks at as many, spread
evenly, and says so, unless --all is given. Ends with code 0 whatever it finds in readable shards, unless
--max-bad-fraction is given."""
SAMPLED = 100_000
_BLOCK = 256
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class CheckOptions:
    shards: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SHARDS")]
    """Tars, folders of tars, URLs, or patterns in quotes such as 'data/train-*.tar' or 'train-{00000..00031}.tar'."""
    shard_cache: str = ""
    """Folder on a local disk for copies of remote shards, as for farl.train."""
    picture: str | None = None
    """PNG to draw: samples with their captions, bad ones by cause, histograms."""
    json: str | None = None
    """File for the same figures as JSON. Interrupted, the same command goes on from JSON.part."""
    all: bool = False
    """Look at every sample, however many there are."""
    decode: bool = False
    """Decode every image too, as training does: finds truncated and broken ones."""
    max_bad_fraction: float | None = None
    """Fail (code 1) when a larger share of the samples is bad."""
    threads: int = os.cpu_count() or 1
    """Threads that read and decode; one a core if not given."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("missing SHARDS; see --help")
        if self.max_bad_fraction is not None and not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction is {self.max_bad_fraction}: wanted 0 to 1")
        if self.threads < 1:
            raise ValueError(f"--threads is {self.threads}: wanted 1 or more")
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise ValueError(f"--picture is {self.picture}: wanted a name that ends with .png")


def check(options: CheckOptions) -> dict[str, Any]:
    """The figures, as they go to JSON; writes that and the picture if asked.

    Raises:
        ValueError: no shard matches or holds a sample, or remote ones have no --shard-cache.
    """
    # Here, so that --help and wrong options do not wait for torch, which the decoder imports.
    from farl.data.probe import Prober
    from farl_engine.data import ShardIndex
    from farl_engine.data.shard_cache import ShardCache

    shard_cache = ShardCache(options.shard_cache) if options.shard_cache else None
    index = ShardIndex.build(options.shards, progress=True, shard_cache=shard_cache)
    positions = spread_positions(len(index), len(index) if options.all else SAMPLED)
    tally = _tally(index, Prober(index, decode=options.decode), positions, options)
    figures = figures_of(index, tally, options.decode)
    if options.picture is not None:
        from farl.data.sheet import draw_sheet

        draw_sheet(index, figures, tally.examples, positions, options.picture)
    if options.json is not None:
        _write(Path(options.json), json.dumps(figures, indent=1) + "\n")
        _part(options.json).unlink(missing_ok=True)
    return figures


def spread_positions(count: int, wanted: int) -> NDArray[np.int64] | range:
    """All of `count` positions, or one drawn at random (the same each time) from each of `wanted` equal parts."""
    if count <= wanted:
        return range(count)
    edges = np.arange(wanted + 1) * count // wanted
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _tally(index: ShardIndex, prober: Prober, positions: NDArray[np.int64] | range, options: CheckOptions) -> Tally:
    """Counts over the positions, going on from what an interrupted call left beside the JSON file."""
    part = _part(options.json) if options.json is not None else None
    what = [index.fingerprint, len(positions), options.decode]
    tally = _load(part, what)
    saved = time.monotonic()
    with Progress(len(positions), "checking") as progress:
        progress.update(tally.checked)
        try:
            for block in _blocks(index, prober, positions[tally.checked :], options.threads):
                tally.merge(block)
                progress.update(block.checked)
                if part is not None and time.monotonic() - saved > _SAVE_SECONDS:
                    _save(part, what, tally)
                    saved = time.monotonic()
        except BaseException:
            if part is not None and tally.checked:
                _save(part, what, tally)
            raise
    if part is not None:
        # It may have taken hours, and the picture is still to be drawn.
        _save(part, what, tally)
    return tally


def _blocks(index: ShardIndex, prober: Prober, positions: NDArray[np.int64] | range, threads: int) -> Iterator[Tally]:
    """Tallies of blocks of positions, in order, a few ahead."""

    def count(start: int) -> Tally:
        tally = Tally()
        for position in map(int, positions[start : start + _BLOCK]):
            tally.add(prober(position), position, index.shard_of(position))
        return tally

    pool, ahead = ThreadPoolExecutor(threads), deque[Future[Tally]]()
    try:
        for start in range(0, len(positions), _BLOCK):
            ahead.append(pool.submit(count, start))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(part: Path | None, what: list[Any]) -> Tally:
    """What an interrupted call with the same data and options counted; nothing of another's."""
    try:
        saved = json.loads(part.read_text()) if part is not None else {}
        return Tally.from_json(saved["tally"]) if saved["what"] == what else Tally()
    except (OSError, KeyError, TypeError, ValueError):
        return Tally()


def _part(path: str) -> Path:
    """What a call leaves that did not come to its end."""
    return Path(f"{path}.part")


def _save(part: Path, what: list[Any], tally: Tally) -> None:
    _write(part, json.dumps({"what": what, "tally": tally.to_json()}))


def _write(path: Path, text: str) -> None:
    """All of it, or nothing where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int | None:
    options = cli.parse(CheckOptions, argv, prog=PROG, description=DESCRIPTION)
    figures = check(options)
    print(table(figures).encode("utf-8", "backslashreplace").decode())
    if options.picture is not None:
        print(f"picture: {options.picture}")
    if options.max_bad_fraction is not None and figures["bad_fraction"] > options.max_bad_fraction:
        from farl_engine.data import BadDataError

        name, causes = next(iter(figures["bad_by_shard"].items()))
        raise BadDataError(
            f"{figures['bad_fraction']:.2%} of the samples are bad, allowed {options.max_bad_fraction:.2%}; "
            f"worst shard {name}: {', '.join(f'{cause} {count:,}' for cause, count in causes.items())}"
        )
    return 0
