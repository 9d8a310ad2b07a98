"""Samples ahead of their use, by threads; and a look at all files before a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from farl.downstream.task import LabelledSet, Sample
from farl.progress import Progress
from farl_engine.distributed import World, gather_objects

# Batches that are read before they are asked for.
AHEAD = 2
NAMED_AT_MOST = 5


def read_batches(
    data: LabelledSet, batches: Iterable[Sequence[int]], threads: int
) -> Generator[list[Sample], None, None]:
    """The samples of each batch of positions, in order, each with its position as "index".

    Args:
        threads: that decode ahead; 0 decodes when asked.

    Raises:
        ValueError, OSError: of the set, at the batch that holds the broken file.
    """

    def read(index: int) -> Sample:
        return {**data[index], "index": index}

    if threads == 0:
        for indices in batches:
            yield [read(int(index)) for index in indices]
        return
    waiting: deque[list[Future[Sample]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        for indices in batches:
            waiting.append([pool.submit(read, int(index)) for index in indices])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def check_files(data: LabelledSet, indices: Sequence[int], option: str, world: World, threads: int) -> None:
    """Decode each of these samples once, shared out over the processes.

    Labelled sets are small and curated: a broken file is a mistake that a person should know of before hours of
    training, and skipping it would make figures that cannot be compared.

    Raises:
        ValueError: some cannot be used; it names the first of them. The same on every process.
    """
    own = list(indices[world.rank :: world.size])

    def problem(index: int) -> str | None:
        try:
            data[index]
        except (ValueError, OSError) as error:
            return " ".join(str(error).split())
        return None

    found = []
    with ThreadPoolExecutor(max(1, threads)) as pool, Progress(len(own), f"check {option}", unit="images") as progress:
        for message in pool.map(problem, own):
            progress.update()
            if message:
                found.append(message)
    problems = [message for part in gather_objects(world, found) for message in part]
    if problems:
        named = "; ".join(problems[:NAMED_AT_MOST]) + "; ..." * (len(problems) > NAMED_AT_MOST)
        raise ValueError(
            f"{len(problems)} of {len(indices)} samples of {option} cannot be used: {named}. "
            "Mend or remove them and run the same command again"
        )
