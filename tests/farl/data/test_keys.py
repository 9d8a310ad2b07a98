"""Keys name the image, read back from a tar as themselves, and stay apart; the split follows the group alone."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farl.data.keys import MAX_KEY_CHARACTERS, in_validation, number_repeats, sample_key
from farl_engine.data.shards import split_key

names = st.text(min_size=1, max_size=30).map(lambda name: name + ".jpg")


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("images/00012.jpg", "images/00012"),
        ("./images//00012.JPEG", "images/00012"),
        ("images\\00012.jpg", "images/00012"),
        ("a.b/photo.v2.jpg", "a_b/photo_v2"),
        ("my face (1).png", "my_face__1_"),
        ("no_suffix", "no_suffix"),
        ("../../x.jpg", "x"),
        (".hidden", "_hidden"),
    ],
)
def test_key_is_the_path_without_suffix(image: str, key: str) -> None:
    assert sample_key(image) == key


def test_lost_letters_do_not_make_keys_equal() -> None:
    assert sample_key("日本.jpg") != sample_key("中国.jpg")
    assert sample_key("é" * 200 + "a.jpg") != sample_key("é" * 200 + "b.jpg")
    assert sample_key("x" * 200 + "a.jpg") != sample_key("x" * 200 + "b.jpg")


@given(st.text(max_size=200))
@example("")
@example("/")
@example("a/.jpg")
@example("\ud800.jpg")
def test_any_path_gives_a_key_that_a_tar_reads_back(image: str) -> None:
    key = sample_key(image)
    assert key.isascii()
    assert 0 < len(key) <= MAX_KEY_CHARACTERS
    assert split_key(f"{key}.jpg".encode()) == (key.encode(), b"jpg")


@given(st.lists(st.sampled_from(["a", "b", "a--2", "a--3", "a--2--2"])))
def test_repeats_become_distinct_and_first_ones_stay(keys: list[str]) -> None:
    numbered = list(number_repeats(keys))
    assert len(set(numbered)) == len(keys)
    assert numbered[:1] == keys[:1]
    assert all(new.startswith(old) for new, old in zip(numbered, keys, strict=True))


def test_a_second_caption_gets_a_number() -> None:
    assert list(number_repeats(["a", "b", "a", "a"])) == ["a", "b", "a--2", "a--3"]


def test_share_of_groups_and_growth_of_the_fraction() -> None:
    groups = [str(n) for n in range(5000)]
    small = {group for group in groups if in_validation(group, 0.1)}
    assert 400 < len(small) < 600
    assert small < {group for group in groups if in_validation(group, 0.2)}
    assert not any(in_validation(group, 0.0) for group in groups)
