"""The tokenizer's ids are open_clip's, whatever the text; packing and threads change nothing."""

from __future__ import annotations

import random
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl import tokenizer as subject
from farl.tokenizer import ClipTokenizer, merge_pairs, pack, tokenize

reference = subject._open_clip_tokenizer()

PIECES = [
    "a photo of a smiling woman", "it's", "they'LL", "don't", "1984", "3.14", "!!!", "...", "--", "#selfie", "@home",
    "&amp;", "&lt;b&gt;", "&amp;amp;", "&#39;", "&eacute;", "&nbsp;", "<br/>", "100%", "C++", "e-mail", "a_b_c",
    "café", "naïve", "Ångström", "straße", "İstanbul", "ﬁligree", "ＦＵＬＬ", "日本語の顔", "中文字幕",
    "лицо", "चेहरा", "وجه", "ใบหน้า", "😀", "👩🏽\u200d🚀", "🇳🇱", "❤️",
    "cafÃ©", "âœ” No problems", "â€™s", "Ã¼ber", "\u00a0", "\u200b", "\u2028", "\ufeff", "\ud800", "e\u0301",
    "\x00", "\x1b[31m", "\t", "\n", "\r\n", "“quoted”", "‘it’s’", "…", "<start_of_text>", "<END_OF_TEXT>",
    "  ", "", "x" * 300, "ab" * 200, "word " * 120, "😀" * 50,
]  # fmt: skip


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def piece() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(PIECES)
        if kind < 0.8:
            return "".join(rng.choices(string.ascii_letters, k=rng.randint(1, 12)))
        if kind < 0.9:
            return "".join(rng.choices(string.printable, k=rng.randint(1, 20)))
        return "".join(chr(rng.choice((rng.randrange(0x20, 0x3000), rng.randrange(0x1F300, 0x1FAFF)))) for _ in "123")

    return [rng.choice(("", " ")).join(piece() for _ in range(rng.randint(0, 8))) for _ in range(count)]


def test_ids_equal_open_clip_on_generated_texts() -> None:
    texts = random_texts(2000, seed=0)
    assert torch.equal(tokenize(texts), reference.tokenize(texts))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(2, 90))
def test_ids_equal_open_clip_on_any_text_and_length(text: str, context_length: int) -> None:
    assert torch.equal(tokenize(text, context_length), reference.tokenize(text, context_length))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abcdefghijklmnop", min_size=1, max_size=300) | st.text(alphabet="ea", min_size=1, max_size=80))
def test_heap_merge_equals_open_clips_loop(word: str) -> None:
    plain = reference.SimpleTokenizer.__new__(reference.SimpleTokenizer)
    plain.cache, plain.bpe_ranks = {}, reference._tokenizer.bpe_ranks
    symbols = [*word[:-1], word[-1] + "</w>"]
    assert merge_pairs(symbols, plain.bpe_ranks) == plain.bpe(word).split(" ")


def test_a_rank_is_finished_before_a_lower_one_that_it_makes() -> None:
    # "abc" arises from (a, bc) at rank 2, and (abc, a) has rank 1: the second (a, bc) still comes first.
    ranks = {("b", "c"): 0, ("abc", "a"): 1, ("a", "bc"): 2}
    assert merge_pairs(list("abcabc"), ranks) == ["abc", "abc"]


def test_known_ids_of_openai_clip() -> None:
    assert tokenize("a diagram").tolist()[0][:5] == [49406, 320, 22697, 49407, 0]
    assert tokenize(["", "hello world!"], 6).tolist() == [
        [49406, 49407, 0, 0, 0, 0],
        [49406, 3306, 1002, 256, 49407, 0],
    ]
    assert tokenize("a").dtype == torch.int64
    assert tokenize([]).shape == (0, 77)


def test_a_cut_text_keeps_its_end_token() -> None:
    ids = tokenize("face " * 200)[0]
    assert ids[-1] == 49407
    assert (ids[:-1] != 49407).all()


def test_one_endless_word_takes_no_time() -> None:
    text = "".join(random.Random(0).choices(string.ascii_lowercase, k=100_000))
    start = time.perf_counter()
    tokenize(text)
    assert time.perf_counter() - start < 10  # open_clip's own loop needs minutes


def test_pack_is_tokenize_without_padding() -> None:
    texts = ["a face", "", "face " * 200, *random_texts(50, seed=1)]
    padded, packed = tokenize(texts), pack(texts)
    assert packed.tokens.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32
    bounds = packed.cu_seqlens.tolist()
    assert len(bounds) == len(texts) + 1
    assert bounds[-1] == len(packed.tokens)
    assert packed.max_seqlen == int(np.diff(bounds).max())
    for row, start, stop in zip(padded, bounds, bounds[1:], strict=False):
        length = int(row.argmax()) + 1  # up to the first end token, where CLIP reads the feature
        assert packed.tokens[start:stop].tolist() == row[:length].tolist()


def test_pack_of_nothing() -> None:
    packed = pack([])
    assert (len(packed.tokens), packed.cu_seqlens.tolist(), packed.max_seqlen) == (0, [0], 0)


def test_many_threads_get_the_same_ids() -> None:
    texts = random_texts(400, seed=2)
    shared = ClipTokenizer()
    expected = reference.tokenize(texts)
    with ThreadPoolExecutor(8) as pool:
        for ids in pool.map(lambda _: shared.tokenize(texts), range(16)):
            assert torch.equal(ids, expected)


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "WORD_CACHE", 10)
    monkeypatch.setattr(subject, "CAPTION_CACHE", 10)
    small = ClipTokenizer()
    texts = [f"word{''.join(c)}" for c in zip(string.ascii_lowercase, reversed(string.ascii_lowercase), strict=True)]
    small.tokenize(texts)
    assert small._cached_caption.cache_info().currsize == 10
    assert small._cached_word.cache_info().currsize == 10
    assert torch.equal(small.tokenize(texts), reference.tokenize(texts))


@pytest.mark.parametrize(
    ("texts", "context_length", "message"),
    [(["a", b"b"], 77, "got bytes: decode it first"), ([None], 77, "got NoneType"), ("a", 1, "context_length is 1")],
)
def test_wrong_arguments_get_one_line(texts: list[str], context_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize(texts, context_length)


def test_open_clip_is_imported_when_its_file_does_not_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("open_clip.tokenizer")
    monkeypatch.delitem(sys.modules, "open_clip.tokenizer", raising=False)
    monkeypatch.setattr(subject.importlib.util, "spec_from_file_location", lambda *_: None)
    monkeypatch.setattr(subject.importlib, "import_module", lambda name: package if name == package.__name__ else None)
    assert subject._open_clip_tokenizer() is package


def test_the_package_around_the_tokenizer_stays_out() -> None:
    code = "import sys, farl.tokenizer as t; t.tokenize('a'); print({'open_clip', 'torchvision'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
