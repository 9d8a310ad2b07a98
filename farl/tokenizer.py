"""CLIP's text tokenizer with the ids of open_clip (and of OpenAI's CLIP), cached and safe to call from many threads.

Vocabulary, merges, cleaning and word pattern come from open_clip (`open_clip/tokenizer.py`, after openai/CLIP
`simple_tokenizer.py`); here are the caches, a merge that stays fast on very long words, and output without padding.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from farl.model.text import PackedText

CONTEXT_LENGTH = 77
# A web corpus has millions of distinct "words" (names, numbers, typos); the frequent ones fit here.
WORD_CACHE = 65_536
# Templated captions repeat; captions of the web do not, and pay about a microsecond for the look-up.
CAPTION_CACHE = 16_384
MAX_CACHED_CHARACTERS = 512


class ClipTokenizer:
    """Captions to CLIP token ids: start token, lower-cased byte-pair tokens, end token.

    A text longer than `context_length` tokens is cut, and its last token is then the end token.
    """

    def __init__(self) -> None:
        source = _open_clip_tokenizer().SimpleTokenizer()
        self.start_id: int = source.sot_token_id
        self.end_id: int = source.eot_token_id
        self.vocab_size: int = source.vocab_size
        self._ids: dict[str, int] = source.encoder
        self._ranks: dict[tuple[str, str], int] = source.bpe_ranks
        self._letter_of_byte: dict[int, str] = source.byte_encoder
        self._find_words = source.pat.finditer
        self._clean = source.clean_fn
        self._cached_word = lru_cache(WORD_CACHE)(self._word)
        self._cached_caption = lru_cache(CAPTION_CACHE)(self._caption)

    def encode(self, text: str, context_length: int = CONTEXT_LENGTH) -> tuple[int, ...]:
        """The ids of one caption, start and end token included, at most `context_length` of them."""
        if len(text) > MAX_CACHED_CHARACTERS:
            return self._caption(text, context_length)
        return self._cached_caption(text, context_length)

    def tokenize(self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
        """int64 [B, context_length], zeros after the end token. ValueError for anything that is not text."""
        rows = self._encode_all(texts, context_length)
        padded = np.zeros((len(rows), context_length), dtype=np.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        return torch.from_numpy(padded)

    def pack(self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> PackedText:
        """The same ids one after the other: tokens int64 [T], cu_seqlens int32 [S+1]. Each sequence ends at its first
        end token, where CLIP reads the text feature: a caption that itself says "<end_of_text>" is cut there."""
        from farl.model.text import PackedText

        rows = [self._until_end(ids) for ids in self._encode_all(texts, context_length)]
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(starts[-1]))
        longest = int(lengths.max()) if len(rows) else 0
        return PackedText(torch.from_numpy(tokens), torch.from_numpy(starts), longest)

    def _encode_all(self, texts: str | Sequence[str], context_length: int) -> list[tuple[int, ...]]:
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}: wanted at least 2, for the start and the end token")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise ValueError(f"texts must be a string or strings, got {type(text).__name__}: decode it first")
            rows.append(self.encode(text, context_length))
        return rows

    def _until_end(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[: ids.index(self.end_id) + 1]

    def _caption(self, text: str, context_length: int) -> tuple[int, ...]:
        # ftfy and HTML unescaping take half of the time and change nothing in plain ASCII without "&".
        if text.isascii() and text.isprintable() and "&" not in text:
            text = " ".join(text.split()).lower()
        else:
            text = self._clean(text)
        room = context_length - 2
        ids = [self.start_id]
        for match in self._find_words(text):
            word = match[0]
            ids += self._cached_word(word) if len(word) <= MAX_CACHED_CHARACTERS else self._word(word)
            if len(ids) > room:  # whatever follows would be cut
                break
        return (*ids[: room + 1], self.end_id)

    def _word(self, word: str) -> tuple[int, ...]:
        symbols = [self._letter_of_byte[byte] for byte in word.encode("utf-8")]
        spelled = "".join(symbols)
        if self._ids.get(spelled) in (self.start_id, self.end_id):
            return (self._ids[spelled],)
        symbols[-1] += "</w>"
        return tuple(self._ids[symbol] for symbol in merge_pairs(symbols, self._ranks))


def merge_pairs(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: again and again merges all occurrences of the pair of lowest rank, left to right.

    The usual loop scans the word once per distinct pair, which takes minutes on a caption that is one long run of
    letters and would stall a loader; a heap of (rank, position) over a linked list takes n log n and gives the same.
    """
    symbols = list(symbols)
    end = len(symbols)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(heap)
    while heap:
        rank = heap[0][0]
        merged = []
        # All pairs of this rank go before any pair that the merging makes, even one of lower rank.
        while heap and heap[0][0] == rank:
            i = heappop(heap)[1]
            j = after[i]
            if j == end or not symbols[i] or ranks.get((symbols[i], symbols[j])) != rank:
                continue  # one of the two was merged meanwhile
            symbols[i] += symbols[j]
            symbols[j] = ""
            after[i] = after[j]
            if after[j] < end:
                before[after[j]] = i
            merged.append(i)
        for i in merged:
            for left in (before[i], i):
                if left >= 0 and after[left] < end:
                    pair = (symbols[left], symbols[after[left]])
                    if pair in ranks:
                        heappush(heap, (ranks[pair], left))
    return [symbol for symbol in symbols if symbol]


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """Token ids of CLIP, int64 [B, context_length], padded with zeros; one string counts as a list of one."""
    return _default().tokenize(texts, context_length)


def pack(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH) -> PackedText:
    """Token ids of CLIP without padding, for the packed text tower: `PackedText(tokens, cu_seqlens, max_seqlen)`."""
    return _default().pack(texts, context_length)


@cache
def _default() -> ClipTokenizer:
    return ClipTokenizer()


def _open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer module, loaded from its file without the package around it.

    `import open_clip` brings timm, torchvision and its model zoo: 3.1 s and a matching torchvision, against 0.2 s for
    this one file (beside torch), and a process of a text loader needs nothing else of it. Should the file ever lean on
    its package, the package is imported.
    """
    name = "open_clip.tokenizer"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("farl._open_clip_tokenizer", path)
    if spec is not None and spec.loader is not None and path.is_file():
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            return module
        except ImportError:
            pass
    return importlib.import_module(name)
