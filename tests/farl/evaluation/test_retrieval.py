from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farl.evaluation.captions import caption_digest, group_captions, normalise_caption
from farl.evaluation.retrieval import retrieval_figures


def digests_of(captions: list[str]) -> torch.Tensor:
    return torch.tensor([caption_digest(caption) for caption in captions])


def oracle(image: np.ndarray, text: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The definition, one query at a time over the whole N x N matrix: sort with wrong items first among equals."""
    names = [" ".join(caption.lower().split()) for caption in captions]
    count = len(names)
    scores = image @ text.T
    distinct = sorted(set(names), key=names.index)
    column = [names.index(name) for name in distinct]

    def rank(row: np.ndarray, right: list[bool]) -> int:
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        return 1 + next(place for place, j in enumerate(order) if right[j])

    image_pairs = [rank(scores[i], [name == names[i] for name in names]) for i in range(count)]
    text_pairs = [rank(scores[:, i], [name == names[i] for name in names]) for i in range(count)]
    image_distinct = [rank(scores[i, column], [name == names[i] for name in distinct]) for i in range(count)]
    text_distinct = [rank(scores[:, j], [name == names[j] for name in names]) for j in column]
    figures: dict[str, float] = {}
    for prefix, first, second in (("", image_pairs, text_pairs), ("distinct_", image_distinct, text_distinct)):
        for name, ranks in (("image_to_text", first), ("text_to_image", second)):
            for k in (1, 5, 10):
                figures[f"{prefix}{name}_r{k}"] = sum(r <= k for r in ranks) / len(ranks)
            figures[f"{prefix}{name}_median_rank"] = sorted(ranks)[(len(ranks) - 1) // 2]
    for k in (1, 5, 10):
        sizes = [names.count(name) for name in names]
        k_of = min(k, count)
        figures[f"chance_r{k}"] = sum(1 - math.comb(count - c, k_of) / math.comb(count, k_of) for c in sizes) / count
    return figures


def assert_equal_to_oracle(figures: dict, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        got = figures["distinct"][name.removeprefix("distinct_")] if name.startswith("distinct_") else figures[name]
        assert got == pytest.approx(value, abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(0, 2**31 - 1),
    st.sampled_from([64, 500, 1 << 20]),
)
def test_figures_equal_the_definition(sizes: tuple[int, int], seed: int, chunk_bytes: int) -> None:
    count, kinds = sizes
    rng = np.random.default_rng(seed)
    captions = [f"Face {kind}" if rng.random() < 0.5 else f" face   {kind} " for kind in rng.integers(0, kinds, count)]
    # Few distinct unit vectors along the axes: exact scores with many ties, and equal captions with equal features.
    axis_of = {" ".join(c.lower().split()): rng.integers(0, 6) for c in captions}
    text = np.eye(6)[[axis_of[" ".join(c.lower().split())] for c in captions]] * 3
    image = np.eye(6)[rng.integers(0, 6, count)] * 2
    figures = retrieval_figures(
        torch.from_numpy(image), torch.from_numpy(text), digests_of(captions), chunk_bytes=chunk_bytes
    )
    assert_equal_to_oracle(figures, oracle(image / 2, text / 3, captions))
    assert figures["pairs"] == count
    assert figures["distinct_captions"] == len(axis_of)


def test_figures_equal_the_definition_on_random_features() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [f"caption {i % 37}" for i in range(120)]
    meaning = torch.nn.functional.normalize(torch.randn(37, 8, generator=generator), dim=1)
    text = meaning[torch.arange(120) % 37]
    image = torch.nn.functional.normalize(text + 0.4 * torch.randn(120, 8, generator=generator), dim=1)
    figures = retrieval_figures(image, text, digests_of(captions), chunk_bytes=2000)
    assert_equal_to_oracle(figures, oracle(image.numpy(), text.numpy(), captions))
    assert figures["image_to_text_r1"] > 3 * figures["chance_r1"]


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_a_model_that_maps_all_to_one_point_gets_nothing(value: float) -> None:
    same = torch.full((30, 4), value)
    figures = retrieval_figures(same, same, digests_of([str(i) for i in range(30)]))
    assert figures["image_to_text_r10"] == figures["text_to_image_r10"] == 0
    assert figures["image_to_text_median_rank"] == 30


def test_one_caption_for_all_is_always_a_hit_and_so_is_chance() -> None:
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    figures = retrieval_figures(features, features, digests_of(["the same"] * 12))
    assert figures["image_to_text_r1"] == figures["text_to_image_r1"] == figures["chance_r1"] == 1
    assert figures["distinct"]["text_to_image_chance_r1"] == 1


def test_no_pairs_and_wrong_shapes() -> None:
    none = retrieval_figures(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int64))
    assert none["pairs"] == 0 and none["image_to_text_r1"] == 0
    with pytest.raises(ValueError, match=r"do not fit; wanted \[N, E\]"):
        retrieval_figures(torch.ones(3, 4), torch.ones(2, 4), digests_of(["a", "b", "c"]))


def test_captions_are_equal_but_for_case_and_white_space() -> None:
    assert normalise_caption("  A\tSmiling\n MAN ") == "a smiling man"
    groups, first = group_captions(digests_of(["b", "a", "B ", "c", "a"]))
    assert groups.tolist() == [0, 1, 0, 2, 1]
    assert first.tolist() == [0, 1, 3]
