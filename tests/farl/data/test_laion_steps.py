"""LAION-Face's steps on the drawn sample, from the id list to training, and after interruptions."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from farl.data.__main__ import main as data_main
from farl.data.laion import select as select_module
from farl.data.laion.card import page
from farl.data.laion.command import CommandOptions, script
from farl.data.laion.faces import FacesOptions, make_faces
from farl.data.laion.filter import FilterOptions, filter_shards
from farl.data.laion.select import SelectOptions, select
from farl_engine.data import ShardIndex
from farl_engine.data.exclusions import read_exclusions
from farl_engine.data.face_crop import read_face_boxes

PAGE = Path(__file__).parents[3] / "docs" / "laion-face.md"


def commands() -> list[str]:
    """The commands of the page, each as one line."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's commands up to the card were run, training left out."""
    folder = tmp_path_factory.mktemp("laion")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in commands():
            words, _, _ = line.partition(" > ")
            if words.startswith("python -m farl.data "):
                assert data_main(shlex.split(words)[3:]) == 0, line
    return folder / "laion"


def shards(folder: Path) -> str:
    return str(folder / "shards" / "split_*" / "*.tar")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "laion"))


def test_every_step_is_on_the_page() -> None:
    from farl.data.laion.__main__ import main

    with pytest.raises(SystemExit):
        main(["nothing"])
    steps = [line.split()[4] for line in commands() if line.startswith("python -m farl.data laion ")]
    assert steps == ["sample", "select", "command", "sample", "filter", "faces", "card"]
    assert any(line.startswith("python -m farl.train ") and "--face-boxes" in line for line in commands())


class TestSelect:
    def options(self, made: Path, out: Path, **more: object) -> SelectOptions:
        return SelectOptions(str(made / "laion_face_ids.pth"), str(made / "laion400m-meta"), str(out), **more)  # type: ignore[arg-type]

    def test_all_ids_are_found_or_accounted_for(self, made: Path, tmp_path: Path) -> None:
        import pyarrow.parquet

        parts = select(self.options(made, tmp_path, min_caption=0))
        assert [part["ids"] for part in parts] == [49, 48] and [part["kept"] for part in parts] == [48, 48]
        assert parts[0]["not_found"] == 1
        table = pyarrow.parquet.read_table(tmp_path / "laion_face_part_00001.parquet")
        assert table.column_names == ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"]
        assert table["SAMPLE_ID"].to_pylist()[0] == 1_060_015_007_919 and not any(
            "other" in url for url in table["URL"].to_pylist()
        )

    def test_limits(self, made: Path, tmp_path: Path) -> None:
        limits = {"min_side": 100, "max_caption": 300, "drop_nsfw": "NSFW,UNSURE", "min_similarity": 0.35}
        parts = select(self.options(made, tmp_path, **limits))
        lost = {cause for part in parts for cause in part["lost"]}
        assert lost == {"short_caption", "long_caption", "small", "low_similarity", "nsfw"}
        assert all(part["rows"] == part["kept"] + sum(part["lost"].values()) for part in parts)

    @pytest.mark.parametrize("kind", ["float64", "string"])
    def test_ids_stored_otherwise_and_rows_that_come_twice(self, made: Path, tmp_path: Path, kind: str) -> None:
        import pyarrow
        import pyarrow.parquet

        source = next((made / "laion400m-meta").glob("part-00000*"))
        table = pyarrow.parquet.read_table(source)
        table = table.set_column(0, "SAMPLE_ID", table["SAMPLE_ID"].cast(kind))
        (tmp_path / "meta").mkdir()
        pyarrow.parquet.write_table(
            pyarrow.concat_tables([table, table]), tmp_path / "meta" / source.name, row_group_size=7
        )
        options = SelectOptions(
            str(made / "laion_face_ids.pth"), str(tmp_path / "meta"), str(tmp_path / "out"), parts="0", min_caption=0
        )
        (part,) = select(options)
        assert part["kept"] == 48 and part["lost"] == {"repeated_id": 48}

    def test_an_interrupted_selection_goes_on(self, made: Path, tmp_path: Path, monkeypatch) -> None:
        whole = select(self.options(made, tmp_path / "whole"))
        real, calls = select_module._select_part, []

        def part(source: Path, *rest: object) -> object:
            calls.append(source.name[:10])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(source, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(select_module, "_select_part", part)
        with pytest.raises(KeyboardInterrupt):
            select(self.options(made, tmp_path / "cut"))
        assert select(self.options(made, tmp_path / "cut")) == whole
        assert calls == ["part-00000", "part-00001", "part-00001"]
        for file in (tmp_path / "whole").iterdir():
            assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()
        assert len(list((tmp_path / "cut").iterdir())) == len(list((tmp_path / "whole").iterdir()))

    def test_other_settings_are_refused_or_overwrite(self, made: Path, tmp_path: Path, monkeypatch) -> None:
        select(self.options(made, tmp_path))
        with pytest.raises(ValueError, match="made with other settings: choose another --out, or add --overwrite"):
            select(self.options(made, tmp_path, min_side=100))
        limited = self.options(made, tmp_path, min_side=100, overwrite=True)
        # Stopped between a part and its counts, the old counts must not stand for the new part.
        monkeypatch.setattr(select_module, "_replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            select(limited)
        monkeypatch.undo()
        assert not (tmp_path / "laion_face_part_00000.json").exists()
        parts = select(limited)
        assert parts[0]["lost"]["small"] > 0

    def test_wrong_input_is_one_line(self, made: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="names part 32"):
            select(self.options(made, tmp_path, parts="0,32"))
        (tmp_path / "meta").mkdir()
        for folder, message in (("none", "is no folder"), ("meta", "holds no part-NNNNN")):
            with pytest.raises(ValueError, match=message):
                select(SelectOptions(str(made / "laion_face_ids.pth"), str(tmp_path / folder), str(tmp_path / "out")))
        (tmp_path / "meta" / "part-00000-x.parquet").write_text("no parquet")
        options = SelectOptions(str(made / "laion_face_ids.pth"), str(tmp_path / "meta"), str(tmp_path / "out"))
        with pytest.raises(ValueError, match=r"lacks part-00001-\*.parquet"):
            select(options)
        (tmp_path / "meta" / "part-00001-x.parquet").write_text("no parquet")
        with pytest.raises(ValueError, match="is no parquet file"):
            select(options)
        assert not list((tmp_path / "out").iterdir())


class TestCommand:
    def test_it_is_a_script_with_one_command_a_part(self, made: Path, tmp_path: Path) -> None:
        folder = tmp_path / "it's here"
        shutil.copytree(made / "parts", folder)
        text = script(CommandOptions(str(folder), "out dir; rm x", processes=3))
        # A stand-in for img2dataset that prints its arguments shows that the quoting holds.
        fake = tmp_path / "bin" / "img2dataset"
        fake.parent.mkdir()
        fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "-- end"\n')
        fake.chmod(0o755)
        environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        shown = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert shown.returncode == 0 and shown.stderr == ""
        first, second, rest = shown.stdout.split("-- end\n")
        words = first.splitlines()
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert rest == "" and given["--url_list"] == str(folder / "laion_face_part_00000.parquet")
        assert given["--output_folder"] == "out dir; rm x/split_00000" and (tmp_path / "out dir; rm x").is_dir()
        assert json.loads(given["--save_additional_columns"]) == ["NSFW", "similarity", "LICENSE", "SAMPLE_ID"]
        expected = {"resize_mode": "no", "skip_reencode": "True", "output_format": "webdataset", "processes_count": "3"}
        assert expected.items() <= {name[2:]: value for name, value in given.items()}.items()
        assert "split_00001" in second

    def test_reencoding_is_a_choice(self, made: Path) -> None:
        text = script(CommandOptions(str(made / "parts"), "out", reencode=True))
        assert "--encode_quality 95" in text and "skip_reencode" not in text

    def test_no_parts(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"make them with `farl.data laion select`"):
            script(CommandOptions(str(tmp_path), "out"))


class TestFilter:
    def test_the_limits_of_the_page(self, made: Path) -> None:
        index = ShardIndex.build(shards(made))
        causes = {cause for path in index.shard_paths for cause in read_exclusions(path).values()}
        assert causes == {"small", "long_caption", "no_face", "duplicate"}
        counts = json.loads((made / "shards" / "laion-filter.json").read_text())
        assert counts["kept"] == len(index) and index.problems == {"filtered": sum(counts["lost"].values())}
        assert index.excluded == 0

    def test_of_equal_images_the_first_stays(self, copy: Path) -> None:
        filter_shards(FilterOptions((shards(copy),), duplicates="keep"))
        index = ShardIndex.build(shards(copy))
        images = [index.read(i)[0] for i in range(len(index))]
        first = {image: i for i, image in reversed(list(enumerate(images)))}
        assert len(first) < len(images)
        filter_shards(FilterOptions((shards(copy),)))
        left = ShardIndex.build(shards(copy))
        names = [(index.shard_of(i), index.key(i)) for i in sorted(first.values())]
        assert [(left.shard_of(i), left.key(i)) for i in range(len(left))] == names

    def test_limits_are_the_least_and_most_that_stay(self, copy: Path) -> None:
        options = FilterOptions((shards(copy),), min_side=110, min_caption=40, max_caption=120, duplicates="keep")
        filter_shards(options)
        index = ShardIndex.build(shards(copy))
        facts = [json.loads(index_json(index, i)) for i in range(len(index))]
        assert min(min(fact["width"], fact["height"]) for fact in facts) == 110
        lengths = {len(fact["caption"]) for fact in facts}
        assert min(lengths) >= 40 and max(lengths) <= 120 and len(facts) > 15

    def test_near_copies(self, copy: Path) -> None:
        lost = filter_shards(FilterOptions((shards(copy),), duplicates="near"))["lost"]
        assert lost["near_duplicate"] >= 2
        kept = sorted(copy.glob("shards/*/*.dhash"))
        times = [path.stat().st_mtime_ns for path in kept]
        assert filter_shards(FilterOptions((shards(copy),), duplicates="near"))["lost"] == lost
        assert [path.stat().st_mtime_ns for path in kept] == times and len(kept) == 6

    def test_without_limits_the_lists_go(self, copy: Path) -> None:
        assert list(copy.glob("shards/*/*.exclude.jsonl"))
        result = filter_shards(FilterOptions((shards(copy),), duplicates="keep"))
        assert result["lost"] == {} and not list(copy.glob("shards/*/*.exclude.jsonl"))
        assert len(ShardIndex.build(shards(copy))) == result["kept"] == result["samples"]

    def test_the_tars_alone_are_enough(self, copy: Path) -> None:
        options = FilterOptions((shards(copy),), min_side=100, max_caption=200, drop_nsfw="UNSURE")
        with_tables = filter_shards(options)
        lists = {path: path.read_bytes() for path in copy.glob("shards/*/*.exclude.jsonl")}
        assert set(with_tables["lost"]) == {"small", "long_caption", "nsfw", "duplicate"}
        for path in (*copy.glob("shards/*/*.parquet"), *lists):
            path.unlink()
        assert filter_shards(options) == with_tables
        assert {path: path.read_bytes() for path in copy.glob("shards/*/*.exclude.jsonl")} == lists

    def test_an_interrupted_filter_is_run_again(self, copy: Path, monkeypatch) -> None:
        from farl.data.laion import filter as subject

        options = FilterOptions((shards(copy),), min_side=100, workers=1)
        expected = filter_shards(options)
        lists = {path.name + path.parent.name: path.read_bytes() for path in copy.glob("shards/*/*.exclude.jsonl")}
        filter_shards(FilterOptions((shards(copy),), duplicates="keep"))
        real, left = subject.write_exclusions, [2]

        def write(*arguments: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "no space left on device")
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(subject, "write_exclusions", write)
        with pytest.raises(OSError, match="no space"):
            filter_shards(options)
        monkeypatch.undo()
        assert filter_shards(options) == expected
        again = {path.name + path.parent.name: path.read_bytes() for path in copy.glob("shards/*/*.exclude.jsonl")}
        assert again == lists

    def test_wrong_input_is_one_line(self, copy: Path) -> None:
        import pyarrow.parquet

        for wrong in ({"min_side": -1}, {"min_face_score": 0.5}, {"detections": "x"}, {"workers": 0}):
            with pytest.raises(ValueError, match="--"):
                FilterOptions(("x",), **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="missing SHARDS"):
            FilterOptions(())
        with pytest.raises(ValueError, match="no shard matches"):
            filter_shards(FilterOptions((str(copy / "none-*.tar"),)))
        path = next(copy.glob("shards/*/00000.parquet"))
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.drop_columns(["sha256", "NSFW"]), path)
        with pytest.raises(ValueError, match="neither sha256 nor md5"):
            filter_shards(FilterOptions((shards(copy),)))
        with pytest.raises(ValueError, match="no column NSFW, which a limit needs"):
            filter_shards(FilterOptions((shards(copy),), drop_nsfw="NSFW", duplicates="keep"))


class TestFaces:
    def test_boxes_lie_on_the_faces(self, made: Path) -> None:
        """The drawn faces are skin in the middle of the box; the street around is noise."""
        import io

        import torch
        from PIL import Image

        index = ShardIndex.build(shards(made))
        faces = read_face_boxes(made / "faces.farl-faces")
        faces.check(index.fingerprint, len(index))
        detections = {}
        for file in (made / "detections").glob("*.pth"):
            detections.update(torch.load(file, weights_only=False))  # what this test's own sample holds
        found = 0
        for i in range(len(index)):
            image = Image.open(io.BytesIO(index.read(i)[0]))
            fact = json.loads(index_json(index, i))
            if np.isnan(faces.score[i]):
                assert "Rotated" in fact["exif"]
                continue
            box, points, score = detections[fact["SAMPLE_ID"]][0]
            pixels = np.clip(box / np.tile(image.size, 2), 0, 1)
            assert np.allclose(faces.box[i], pixels, atol=1e-5) and faces.score[i] == score
            assert np.allclose(faces.points[i].reshape(5, 2) * image.size, points, atol=1e-3)
            found += 1
        assert found > 40

    def test_the_same_file_again_and_another_after_another_filter(self, copy: Path) -> None:
        before = (copy / "faces.farl-faces").read_bytes()
        options = FacesOptions(shards(copy), str(copy / "detections"), str(copy / "faces.farl-faces"))
        make_faces(options)
        assert (copy / "faces.farl-faces").read_bytes() == before
        filter_shards(FilterOptions((shards(copy),), min_side=100))
        index = ShardIndex.build(shards(copy))
        with pytest.raises(ValueError, match=r"run `python -m farl.data laion faces` on this data"):
            read_face_boxes(copy / "faces.farl-faces").check(index.fingerprint, len(index))
        counts = make_faces(options)["counts"]
        read_face_boxes(copy / "faces.farl-faces").check(index.fingerprint, len(index))
        assert set(counts) == {"face", "turned", "no_face", "low_score"}
        assert not [path for path in copy.iterdir() if path.name.startswith(".")]

    def test_repacked_shards_keep_their_faces(self, copy: Path) -> None:
        from farl.data.build import BuildOptions, build

        old = read_face_boxes(copy / "faces.farl-faces")
        report = build(BuildOptions(str(copy / "shards"), str(copy / "repacked")))
        assert {"filtered_small", "filtered_duplicate"} <= set(report.skipped)
        result = make_faces(
            FacesOptions(str(copy / "repacked" / "*.tar"), str(copy / "detections"), str(copy / "new.farl-faces"))
        )
        new = read_face_boxes(copy / "new.farl-faces")
        assert result["samples"] == len(old)
        assert np.array_equal(new.box, old.box, equal_nan=True)

    def test_other_data_mixed_in_has_no_faces(self, made: Path, tmp_path: Path) -> None:
        from farl_engine.data import write_shards

        index = ShardIndex.build(shards(made))
        samples = [{"key": str(i), "image": index.read(i)[0], "caption": "a face"} for i in range(3)]
        write_shards(samples, tmp_path / "other" / "%03d.tar")
        other, out = str(tmp_path / "other"), str(tmp_path / "mixed.farl-faces")
        result = make_faces(FacesOptions(f"'3={shards(made)}' 1={other}", str(made / "detections"), out))
        assert result["counts"]["unknown_sample"] == 3 and result["samples"] == len(index) + 3
        faces = read_face_boxes(out)
        assert np.array_equal(faces.box[:-3], read_face_boxes(made / "faces.farl-faces").box, equal_nan=True)
        assert np.isnan(faces.box[-3:]).all()
        with pytest.raises(ValueError, match=r"tells their samples' SAMPLE_ID"):
            make_faces(FacesOptions(other, str(made / "detections"), str(tmp_path / "x")))
        assert not (tmp_path / "x").exists()


def index_json(index: ShardIndex, i: int) -> bytes:
    import tarfile

    with tarfile.open(index.shard_paths[index.shard_of(i)]) as tar:
        return tar.extractfile(f"{index.key(i)}.json").read()  # type: ignore[union-attr]


class TestCard:
    def test_the_losses_add_up(self, made: Path) -> None:
        card = json.loads((made / "card" / "card.json").read_text())
        index = ShardIndex.build(shards(made))
        assert card["check"]["fingerprint"] == index.fingerprint and card["downloaded"] == "2026-11"
        assert card["select"]["kept"] == card["download"]["count"]
        assert card["select"]["ids"] == card["select"]["kept"] + sum(card["select"]["lost"].values())
        assert card["download"]["successes"] == len(index) + sum(card["filter"]["lost"].values())
        assert card["download"]["failed_to_download"] == card["download"]["status"]["HTTP Error 404: Not Found"] > 0
        for counts in (card["licence"], card["nsfw"], card["short_side"]):
            assert sum(counts.values()) == len(index)
        assert sum(card["faces"]["counts"].values()) == len(index)
        text = (made / "card" / "card.md").read_text()
        assert index.fingerprint in text and f"| check | samples left | {len(index)} |" in text
        assert text == page(card)

    def test_what_stands_in_the_data_stays_text(self, made: Path) -> None:
        card = json.loads((made / "card" / "card.json").read_text())
        card["licence"] = {"a|b\n# c <script> [x](http://y)": 1}
        assert "\n# c" not in page(card) and "a\\|b # c \\<script> \\[x](http://y)" in page(card)

    def test_other_faces_are_refused(self, copy: Path) -> None:
        filter_shards(FilterOptions((shards(copy),)))
        words = ["laion", "card", shards(copy), "--out", str(copy / "new")]
        assert data_main(words) == 0
        assert json.loads((copy / "new" / "card.json").read_text())["downloaded"] is None
        with pytest.raises(ValueError, match="faces of other data"):
            data_main([*words, "--face-boxes", str(copy / "faces.farl-faces")])


def test_training_takes_the_plan_or_refuses_in_one_line(made: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from farl.config import quickstart
    from farl.initialize import check_sources, crop_plan
    from farl_engine.data import CropPlan, FaceCropPlan

    index = ShardIndex.build(shards(made))
    config = replace(quickstart(), face_boxes=str(made / "faces.farl-faces"), crop_scale=0.3)
    plan = crop_plan(config, index)
    assert isinstance(plan, FaceCropPlan) and plan.scale == (0.3, 1.0) and len(plan.faces) == len(index)
    assert crop_plan(replace(config, face_boxes=""), index) == CropPlan(scale=(0.3, 1.0))
    other = ShardIndex.build(str(made / "shards" / "split_00000" / "*.tar"))
    with pytest.raises(ValueError, match=r"--face-boxes .*: the face boxes are of .* samples with fingerprint"):
        crop_plan(config, other)
    with pytest.raises(ValueError, match=r"--face-boxes names .*, which does not exist"):
        check_sources(replace(config, face_boxes=str(tmp_path / "none")), None)


@pytest.mark.slow
def test_every_command_of_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to(sys.executable)
    root = PAGE.parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "engine", root / "kernels"))),
    }
    for line in commands():
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    log = (tmp_path / "laion" / "run" / "metrics.jsonl").read_text()
    assert '"step": 2' in log
    assert (
        json.loads((tmp_path / "laion" / "run" / "config.json").read_text())["face_boxes"] == "laion/faces.farl-faces"
    )
