"""`farl.data check` counts exactly what was put wrong, as table and as JSON, and fails only when asked to."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from farl.data.build import BuildOptions, build
from farl.data.check import PERCENTILES, CheckOptions, check, percentiles, table
from farl.data.check import main as check_main
from farl_engine.data import BadDataError, write_shards

FARL_DATA = os.environ.get("FARL_DATA")


def picture(width: int = 64, height: int = 48, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    def sample(n: int, image: bytes, caption: bytes | str = "a face", ext: str = "jpg") -> dict[str, object]:
        return {"key": f"{n:03}", "image": image, "image_ext": ext, "caption": caption}

    good = [sample(n, picture(64 + n, 48), f"caption {n // 2}") for n in range(10)]
    odd = [
        sample(10, picture(progressive=True), b"caf\xe9"),
        sample(11, picture(20, 90, "PNG"), ext="png"),
        sample(12, b"<html></html>"),
        sample(13, picture()[:900]),
        sample(14, picture(), "  \n"),
        sample(15, picture(), ""),
        sample(16, b""),
    ]
    write_shards(good, tmp_path / "train-%03d.tar", samples_per_shard=5)
    write_shards(odd, tmp_path / "odd-%03d.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    return tmp_path


def figures_of(folder: Path, **options: object) -> dict[str, object]:
    return check(CheckOptions((str(folder),), **options))  # type: ignore[arg-type]


def test_headers_alone(shards: Path) -> None:
    figures = figures_of(shards)
    assert (figures["shards"], figures["samples"], figures["good"]) == (4, 17, 13)
    assert figures["bad"] == {"missing_caption": 2, "not_an_image": 1, "empty_image": 1}
    assert figures["bad_fraction"] == pytest.approx(4 / 17)
    assert figures["bad_by_shard"] == {"odd-000.tar": {"missing_caption": 2, "not_an_image": 1, "empty_image": 1}}
    assert figures["bad_examples"]["not_an_image"] == "odd-000.tar: 012"  # type: ignore[index]
    assert figures["shard_problems"] == {"empty.tar": ["empty_shard"]}
    assert figures["formats"] == {"jpeg": 12, "png": 1}
    assert figures["progressive"] == 1
    assert figures["progressive_fraction"] == pytest.approx(1 / 12)
    assert figures["short_side"] == {"0": 20, "5": 20, "50": 48, "95": 48, "100": 48}
    assert figures["long_side"]["100"] == 90  # type: ignore[index]
    assert figures["caption_characters"]["0"] == 4  # type: ignore[index]
    assert figures["distinct_captions"] == 7
    assert figures["captions_not_utf8"] == 1
    assert len(figures["fingerprint"]) == 32  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_finds_the_truncated_image(shards: Path, threads: int) -> None:
    figures = figures_of(shards, decode=True, threads=threads)
    assert figures["bad"] == {"missing_caption": 2, "not_an_image": 1, "empty_image": 1, "truncated": 1}
    assert figures["good"] == 12


def test_too_many_pixels_are_found_in_the_header(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    samples = [{"key": "big", "image": buffer.getvalue(), "image_ext": "png", "caption": "big"}]
    write_shards([*samples, {"key": "ok", "image": picture(), "caption": "x"}], tmp_path / "s-%d.tar")
    for decode in (False, True):
        assert figures_of(tmp_path, decode=decode)["bad"] == {"too_many_pixels": 1}


def test_table_and_json_from_the_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shards / "new" / "figures.json"
    assert check_main([str(shards / "train-*.tar"), str(shards / "odd-000.tar"), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures == check(CheckOptions((str(shards / "train-*.tar"), str(shards / "odd-000.tar"))))
    assert printed.strip() == table(figures)
    for text in (figures["fingerprint"], "4 (23.53%)", "not_an_image", "odd-000.tar: 012", "jpeg 12, png 1", "8.3%"):
        assert text in printed


def test_too_large_a_share_fails_and_names_the_worst_shard(shards: Path) -> None:
    assert check_main([str(shards), "--max-bad-fraction", "0.3"]) == 0
    with pytest.raises(BadDataError, match=r"23.53% .* allowed 20.00%; worst shard odd-000.tar: missing_caption 2"):
        check_main([str(shards), "--max-bad-fraction", "0.2"])
    assert check_main([str(shards / "train-*.tar"), "--max-bad-fraction", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing SHARDS"),
        (["x.tar", "--max-bad-fraction", "2"], "--max-bad-fraction is 2.0: wanted 0 to 1"),
        (["x.tar", "--threads", "0"], "--threads is 0"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        check_main(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@given(st.lists(st.integers(0, 50), min_size=1))
def test_percentiles_are_nearest_rank(values: list[int]) -> None:
    expected = np.percentile(values, PERCENTILES, method="inverted_cdf")
    assert list(percentiles(Counter(values)).values()) == expected.tolist()


def test_nothing_good_gives_a_table_all_the_same(tmp_path: Path) -> None:
    write_shards([{"key": "a", "image": b"<html>", "caption": "x"}], tmp_path / "s-%d.tar")
    figures = figures_of(tmp_path)
    assert (figures["good"], figures["short_side"]) == (0, {})
    assert "not_an_image" in table(figures)


@pytest.mark.skipif(not FARL_DATA, reason="FARL_DATA is not set: no real photographs")
def test_real_photographs_all_decode(tmp_path: Path) -> None:
    build(BuildOptions(str(Path(FARL_DATA or "") / "faces/pairs.tsv"), str(tmp_path), max_samples=50))
    figures = figures_of(tmp_path, decode=True)
    assert (figures["good"], figures["bad"], figures["formats"]) == (50, {}, {"jpeg": 50})
    assert figures["short_side"] == dict.fromkeys(("0", "5", "50", "95", "100"), 250)
