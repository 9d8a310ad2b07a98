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

from farl.data import check as check_module
from farl.data import sheet
from farl.data import tally as tally_module
from farl.data.build import BuildOptions, build
from farl.data.check import CheckOptions, check, spread_positions
from farl.data.check import main as check_main
from farl.data.figures import table, wilson
from farl.data.tally import PERCENTILES, Distinct, histogram, percentiles
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
    assert (figures["checked"], figures["sampled"], figures["bad_fraction_interval"]) == (15, False, None)
    assert figures["decoded_by"] == {"hardware": 10, "gpu": 1, "cpu": 2}  # PNG, and the JPEG cut short
    assert figures["caption_tokens"]["5"] == 4  # type: ignore[index]  # start, caption, 0, end
    assert sum(figures["histograms"]["long_side"]["counts"]) == 13  # type: ignore[index]


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
        (["x.tar", "--picture", "sheet.jpg"], "wanted a name that ends with .png"),
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


def test_kinds_of_images_and_long_captions(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffers = [io.BytesIO() for _ in range(3)]
    Image.new("L", (30, 20)).save(buffers[0], "JPEG")
    Image.new("CMYK", (30, 20)).save(buffers[1], "JPEG")
    Image.new("RGB", (40, 10)).save(buffers[2], "JPEG", exif=exif)
    captions = ["gray", "print", "word " * 90]
    write_shards(
        [
            {"key": str(n), "image": buffer.getvalue(), "caption": caption}
            for n, (buffer, caption) in enumerate(zip(buffers, captions, strict=True))
        ],
        tmp_path / "s-%d.tar",
    )
    figures = figures_of(tmp_path)
    kinds = ("gray", "cmyk", "exif_rotated", "captions_cut", "progressive")
    assert [figures[kind] for kind in kinds] == [1, 1, 1, 1, 0]
    assert figures["decoded_by"] == {"hardware": 1, "gpu": 0, "cpu": 2}
    assert figures["caption_tokens"]["100"] == 92  # type: ignore[index]
    edges, counts = figures["histograms"]["percent_wide"].values()  # type: ignore[attr-defined]
    upright = max(edge for edge, count in zip(edges[:-1], counts, strict=True) if count and edge < 100)
    assert upright == 25  # 10 x 40, turned


def test_a_large_set_is_sampled_evenly_and_says_so(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "SAMPLED", 5)
    figures = figures_of(shards)
    assert (figures["samples"], figures["checked"], figures["sampled"]) == (17, 5, True)
    assert figures["good"] + sum(figures["bad"].values()) == pytest.approx(17, abs=2)  # type: ignore[attr-defined]
    low, high = figures["bad_fraction_interval"]  # type: ignore[misc]
    assert 2 / 17 <= low <= figures["bad_fraction"] <= high <= 1
    assert "5, spread evenly; --all looks at each" in table(figures)
    whole = figures_of(shards, all=True)
    assert whole["checked"] == 15 and "about" not in table(whole)


def test_filtered_samples_and_many_broken_shards_stay_short(shards: Path) -> None:
    (shards / "train-000.exclude.jsonl").write_text('["001", "small"]\n["003", "small"]\n')
    for number in range(15):
        (shards / f"zero-{number}.tar").write_bytes(b"")
    figures = figures_of(shards)
    assert (figures["filtered"], figures["samples"], figures["good"]) == (2, 15, 11)
    printed = table(figures)
    assert "2, by the lists beside the shards" in printed
    assert "and 6 more shards with such faults" in printed and printed.count("empty_shard") == 10


def test_spread_positions_take_one_of_each_part() -> None:
    drawn = np.asarray(spread_positions(1003, 100))
    edges = np.arange(101) * 1003 // 100
    assert ((edges[:-1] <= drawn) & (drawn < edges[1:])).all()
    assert (drawn == spread_positions(1003, 100)).all()
    assert spread_positions(7, 7) == range(7)


def test_an_interrupted_check_goes_on_where_it_was(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_BLOCK", 2)
    monkeypatch.setattr(check_module, "_SAVE_SECONDS", 0.0)
    out = shards / "figures.json"
    whole = figures_of(shards)
    merge, merged = check_module.Tally.merge, []

    def interrupted(self: object, other: object) -> None:
        merge(self, other)  # type: ignore[arg-type]
        merged.append(other.checked)  # type: ignore[attr-defined]
        if len(merged) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(check_module.Tally, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figures_of(shards, json=str(out), threads=2)
    assert json.loads((shards / "figures.json.part").read_text())["tally"]["checked"] == 6
    assert figures_of(shards, json=str(out)) == whole
    assert sum(merged) == 15  # nothing was looked at twice
    assert not (shards / "figures.json.part").exists()


def test_what_was_counted_outlives_a_picture_that_cannot_be_drawn(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = shards / "figures.json", {"json": str(shards / "figures.json"), "picture": str(shards / "sheet.png")}
    whole = figures_of(shards)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(sheet, "draw_sheet", full)
    with pytest.raises(OSError, match="no space"):
        figures_of(shards, **options)
    monkeypatch.setattr(sheet, "draw_sheet", lambda *_: None)
    monkeypatch.setattr(check_module.Tally, "add", full)  # nothing is looked at again
    assert figures_of(shards, **options) == whole == json.loads(out.read_text())
    assert not list(shards.glob("figures.json.*"))


def test_remote_shards_are_fetched_first(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    remote = f"pipe:cat {shards / 'odd-000.tar'}"
    with pytest.raises(ValueError, match="--shard-cache"):
        check(CheckOptions((remote,)))
    cache = tmp_path_factory.mktemp("cache")
    figures = check(CheckOptions((remote,), shard_cache=str(cache)))
    local = check(CheckOptions((str(shards / "odd-000.tar"),)))
    names = ("fingerprint", "samples", "bad", "shard_bytes")
    assert [figures[name] for name in names] == [local[name] for name in names]


def test_another_sets_leftovers_are_not_taken(shards: Path) -> None:
    part = shards / "figures.json.part"
    tally = check_module.Tally(checked=9).to_json()
    for content in ("{", json.dumps({"what": ["other", 15, False], "tally": tally})):
        part.write_text(content)
        assert figures_of(shards, json=str(shards / "figures.json"))["checked"] == 15


def test_distinct_captions_are_estimated_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "EXACT_CAPTIONS", 256)
    total = Distinct()
    for start in range(0, 4000, 100):
        part = Distinct()
        for number in range(start, start + 200):  # half of them again in the next part
            part.add(f"caption {number}")
        total.merge(part)
        if start == 0:
            assert total.count() == 200
    assert total.count() == pytest.approx(4100, rel=0.2)
    assert Distinct(total.hashes()).count() == total.count()


def test_histograms_keep_what_lies_outside() -> None:
    binned = histogram(Counter({-5: 1, 0: 2, 9: 3, 10: 4, 99: 5}), np.array([0.0, 10.0, 20.0]))
    assert binned == {"edges": [0.0, 10.0, 20.0], "counts": [6, 9]}
    assert histogram(Counter(), np.array([0.0, 1.0]))["counts"] == [0]


def test_wilsons_interval() -> None:
    assert wilson(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_the_picture_shows_samples_and_bad_ones(shards: Path) -> None:
    out = shards / "new" / "sheet.png"
    assert check_main([str(shards), "--decode", "--picture", str(out)]) == 0
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    red = (np.abs(pixels - [0xCF, 0x48, 0x48]).max(-1) <= 6).any(axis=0)
    assert red.sum() > 300  # frames of the bad ones, bars of their causes
    # Wholly white down to the bottom: nothing is cut off at the edges.
    assert (pixels[:, :8] == 255).all() and (pixels[:, -8:] == 255).all() and (pixels[-8:] == 255).all()


def test_nothing_good_gives_a_table_all_the_same(tmp_path: Path) -> None:
    write_shards([{"key": "a", "image": b"<html>", "caption": "x"}], tmp_path / "s-%d.tar")
    figures = figures_of(tmp_path)
    assert (figures["good"], figures["short_side"]) == (0, {})
    figures_of(tmp_path, picture=str(tmp_path / "sheet.png"))
    assert "not_an_image" in table(figures)


@pytest.mark.skipif(not FARL_DATA, reason="FARL_DATA is not set: no real photographs")
def test_real_photographs_all_decode(tmp_path: Path) -> None:
    build(BuildOptions(str(Path(FARL_DATA or "") / "faces/pairs.tsv"), str(tmp_path), max_samples=50))
    figures = figures_of(tmp_path, decode=True)
    assert (figures["good"], figures["bad"], figures["formats"]) == (50, {}, {"jpeg": 50})
    assert figures["short_side"] == dict.fromkeys(("0", "5", "50", "95", "100"), 250)
