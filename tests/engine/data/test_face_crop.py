"""The crop holds the face wherever that can be, is CropPlan's own without one, and its file is refused if wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farl_engine.data import CropPlan, FaceCropPlan
from farl_engine.data.face_crop import read_face_boxes, write_face_boxes

NONE = np.full((1, 4), np.nan, np.float32)
SIDES = st.integers(1, 2500)
SHARES = st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)).filter(lambda ends: ends[0] != ends[1])


def plan(faces: np.ndarray, **options: object) -> FaceCropPlan:
    return FaceCropPlan(faces=np.asarray(faces, np.float32), **options)  # type: ignore[arg-type]


def box_of(crops: CropPlan, sample: int, view: int, width: int, height: int) -> tuple[int, int, int, int]:
    return crops.box(crops.parameters(5, [sample], [view])[0], width, height)


@settings(max_examples=400, deadline=None)
@given(SIDES, SIDES, SHARES, SHARES, st.integers(0, 10**6), st.sampled_from([0.08, 0.3, 0.9]), st.booleans())
def test_the_face_is_inside_whenever_geometry_allows(width, height, across, down, view, scale, grid):
    x0, x1, y0, y1 = *sorted(across), *sorted(down)
    crops = plan([[x0, y0, x1, y1]], scale=(scale, 1.0), jpeg_grid=grid)
    left, top, right, bottom = box_of(crops, 0, view, width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    # The largest box of a permitted ratio is the most that geometry gives.
    most_wide, most_high = crops._largest_size(width, height)
    spans = [
        (left, right, math.floor(x0 * width), math.ceil(x1 * width), most_wide),
        (top, bottom, math.floor(y0 * height), math.ceil(y1 * height), most_high),
    ]
    fits = all(high - low <= most for _, _, low, high, most in spans)
    for first, last, low, high, most in spans:
        if fits or (high - low <= most and not grid):
            assert first <= low and high <= last
        elif not grid:
            assert low <= first and last <= high


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(0, 10**6), st.floats(0.05, 1), st.booleans(), st.sampled_from([0.0, 0.4]))
def test_without_a_face_everything_is_crop_plans(width, height, view, scale, grid, jitter):
    options = {"scale": (scale, 1.0), "jpeg_grid": grid, "color_jitter": jitter}
    usual, crops = CropPlan(**options), plan(NONE, **options)
    mine, theirs = (one.parameters(5, [0], [view])[0] for one in (crops, usual))
    assert crops.box(mine, width, height) == usual.box(theirs, width, height)
    assert crops.box(None, width, height) == usual.box(None, width, height)
    assert crops.flips(mine) == usual.flips(theirs)
    assert crops.jitter(mine) == usual.jitter(theirs)


def test_a_face_moves_no_draw_and_no_other_sample():
    faces = np.array([[0.1, 0.1, 0.3, 0.3], [np.nan] * 4, [0.6, 0.5, 0.9, 0.8]], np.float32)
    crops, usual = plan(faces, color_jitter=0.4), CropPlan(color_jitter=0.4)
    ids, views = np.array([2, 0, 1]), np.array([4, 0, 9])
    rows = crops.parameters(3, ids, views)
    assert np.array_equal(rows[:, :-4], usual.parameters(3, ids, views))
    assert np.array_equal(rows[:, -4:], faces[ids].astype(np.float64), equal_nan=True)
    assert np.array_equal(rows[1], crops.parameters(3, [0], [0])[0])


def test_crops_differ_between_views_and_the_face_is_not_always_in_one_place():
    crops = plan([[0.4, 0.4, 0.5, 0.5]], scale=(0.2, 0.5))
    boxes = np.array([box_of(crops, 0, view, 600, 400) for view in range(300)])
    assert len(np.unique(boxes, axis=0)) > 290
    middle = (270 - boxes[:, 0]) / (boxes[:, 2] - boxes[:, 0])
    assert middle.min() < 0.25 and middle.max() > 0.75


def test_small_crops_that_would_cut_the_face_are_passed_over():
    face = np.array([[0.2, 0.1, 0.8, 0.9]])
    cut = CropPlan(scale=(0.1, 1.0), jpeg_grid=False)
    rows = cut.parameters(5, np.zeros(200, int), np.arange(200))
    lost = sum(
        not (x0 <= 80 and y0 <= 30 and x1 >= 320 and y1 >= 270)
        for x0, y0, x1, y1 in (cut.box(row, 400, 300) for row in rows)
    )
    assert lost > 100
    crops = plan(face, scale=(0.1, 1.0), jpeg_grid=False)
    areas = []
    for row in crops.parameters(5, np.zeros(200, int), np.arange(200)):
        x0, y0, x1, y1 = crops.box(row, 400, 300)
        assert x0 <= 80 and y0 <= 30 and x1 >= 320 and y1 >= 270
        areas.append((x1 - x0) * (y1 - y0) / 120_000)
    assert min(areas) < 0.75


def test_a_share_of_the_face_may_be_cut_if_asked():
    crops = plan([[0.0, 0.0, 0.5, 1.0]], scale=(0.2, 0.6), keep=0.5, jpeg_grid=False)
    for view in range(100):
        x0, y0, x1, y1 = box_of(crops, 0, view, 800, 400)
        inside = max(0, min(x1, 400) - x0) * (y1 - y0)
        most_wide, most_high = crops._largest_size(800, 400)
        assert most_wide >= 283 and most_high >= 283
        assert inside >= 0.5 * 400 * 400


@pytest.mark.parametrize(
    ("faces", "options", "message"),
    [
        (np.zeros((3, 5)), {}, r"faces must be \[N, 4\]"),
        (NONE, {"keep": 0}, "keep must be more than 0"),
        (NONE, {"scale": (0, 1)}, "scale must be"),
    ],
)
def test_wrong_plans_are_refused(faces, options, message):
    with pytest.raises(ValueError, match=message):
        plan(faces, **options)


class TestFile:
    def test_it_reads_back_and_knows_its_data(self, tmp_path):
        box, points, score = (
            np.eye(3, 4, dtype=np.float32),
            np.ones((3, 10), np.float32),
            np.arange(3, dtype=np.float32),
        )
        write_face_boxes(
            tmp_path / "a.farl-faces", box, points, score, {"fingerprint": "f" * 32, "counts": {"face": 3}}
        )
        faces = read_face_boxes(tmp_path / "a.farl-faces")
        assert len(faces) == 3 and faces.meta["counts"] == {"face": 3}
        assert np.array_equal(faces.box, box) and np.array_equal(faces.points, points)
        assert np.array_equal(faces.score, score) and not faces.box.flags.writeable
        faces.check("f" * 32, 3)
        for fingerprint, count in (("e" * 32, 3), ("f" * 32, 4)):
            with pytest.raises(ValueError, match=r"run `python -m farl.data laion faces` on this data"):
                faces.check(fingerprint, count)

    def test_other_files_are_refused_in_one_line(self, tmp_path):
        from farl_engine.data import array_file

        path = tmp_path / "x"
        contents = {
            "text": b"hello" * 20,
            "empty": b"",
        }
        for content in contents.values():
            path.write_bytes(content)
            with pytest.raises(ValueError, match="is not a file of face boxes"):
                read_face_boxes(path)
        array_file.write(path, {"kind": "other", "version": 1, "samples": 0}, {})
        with pytest.raises(ValueError, match="it is 'other'"):
            read_face_boxes(path)
        meta = {"kind": "farl face boxes", "version": 1, "samples": 2}
        array_file.write(path, meta, {name: np.zeros(3, np.float32) for name in ("box", "points", "score")})
        with pytest.raises(ValueError, match="is not a file of face boxes"):
            read_face_boxes(path)
        with pytest.raises(FileNotFoundError):
            read_face_boxes(tmp_path / "none")
