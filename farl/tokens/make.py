"""Visual tokens of an index's samples, made with the crops and the rule for bad samples that training has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from farl.tokens.cache import TokenCache
from farl.tokens.tokenizer import VisualTokenizer
from farl_engine.data import Loader

AGREEMENT_SAMPLES = 256


@dataclass(frozen=True)
class Rows:
    """Which (sample, view) comes at which of `total` places: an order for the loader, in batches of `global_batch`.

    Attributes:
        at: places int64 [n] -> ids and views, int64 [n] each.
    """

    num_samples: int
    global_batch: int
    total: int
    at: Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]

    @property
    def steps(self) -> int:
        return -(-self.total // self.global_batch)

    def ids(self, step: int) -> NDArray[np.int64]:
        return self.at(self._places(step))[0]

    def views(self, step: int) -> NDArray[np.int64]:
        return self.at(self._places(step))[1]

    def _places(self, step: int) -> NDArray[np.int64]:
        places = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        # Batches have one size; what the last one lacks comes from the start, so that no bad sample counts often.
        return places % self.total


@dataclass(frozen=True)
class TokenRows:
    """Tokens of the rows of one batch.

    Attributes:
        ids, used_ids, views: int64 [n]; rows whose two ids differ are of bad samples and hold a replacement's tokens.
        tokens: int64 [n, P].
        unreadable: bool [n], rows of bad samples in a batch in which reads failed, which may succeed another time.
    """

    ids: NDArray[np.int64]
    used_ids: NDArray[np.int64]
    views: NDArray[np.int64]
    tokens: NDArray[np.int64]
    unreadable: NDArray[np.bool_]


def make_tokens(
    index: Any,
    rows: Rows,
    tokenizer: VisualTokenizer,
    *,
    decoder: Any,
    plan: Any,
    seed: int,
    device: torch.device,
    threads: int,
    max_bad_fraction: float = 1.0,
) -> Iterator[TokenRows]:
    """The tokens of `rows`, batch by batch; images are decoded ahead by threads that end with the iteration.

    Args:
        index, decoder, plan, seed: as training has them; the decoder makes pictures of the tokenizer's size too.

    Raises:
        BadDataError: more than `max_bad_fraction` of the samples are bad.
    """
    loader = Loader(
        index,
        rows,
        decoder=decoder,
        plan=plan,
        seed=seed,
        threads=threads,
        max_bad_fraction=max_bad_fraction,
        device=device,
        end_step=rows.steps,
    )
    left, failed = rows.total, 0
    with loader:
        for batch in loader:
            tokens = tokenizer(batch.images if batch.token_images is None else batch.token_images)
            loader.check_bad()
            count, failed_before = min(left, rows.global_batch), failed
            failed = loader.bad_samples.get("unreadable", 0)
            left -= count
            ids, used, views, host = (
                value[:count].cpu().numpy() for value in (batch.ids, batch.used_ids, batch.views, tokens)
            )
            yield TokenRows(ids, used, views, host, (ids != used) & (failed > failed_before))


def measure_agreement(
    cache: TokenCache,
    index: Any,
    tokenizer: VisualTokenizer,
    *,
    decoder: Any,
    plan: Any,
    device: torch.device,
    threads: int,
    samples: int = AGREEMENT_SAMPLES,
) -> float:
    """Share of a cache's tokens that come out the same here: 1.0 is bit-equal.

    Args:
        decoder, plan, device: those of the run that asks.
        samples: how many are tried, at equal distances in the index, each in one of the cache's views.
    """
    count = min(samples, len(index))
    ids = np.arange(count, dtype=np.int64) * len(index) // count
    views = np.arange(count, dtype=np.int64) % cache.manifest.views
    rows = Rows(len(index), min(64, count), count, lambda places: (ids[places], views[places]))
    same = total = 0
    made = make_tokens(
        index, rows, tokenizer, decoder=decoder, plan=plan, seed=cache.manifest.seed, device=device, threads=threads
    )
    for part in made:
        kept = cache.rows(part.used_ids, part.views).numpy()
        same += int((kept == part.tokens).sum())
        total += int((kept >= 0).sum())
    return same / max(total, 1)
