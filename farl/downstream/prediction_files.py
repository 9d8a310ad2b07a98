"""What `farl.predict` writes: a mask, points or probabilities for each face, a picture for each image, one summary."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from farl.downstream import draw_attributes
from farl.downstream.alignment_data import PTS_ORIGIN
from farl.downstream.draw_alignment import BETWEEN, FOUND
from farl.downstream.draw_parsing import class_colors, overlay
from farl.downstream.given_faces import Face
from farl.downstream.predictor import Predictor

JPEG_QUALITY = 92
PIXELS = "of the upright image, pixel centres at whole numbers: the first pixel is (0, 0)"


class PredictionFiles:
    """A folder of predictions.

    parsing: masks/NAME.png, class numbers with a palette, of the image's own size. alignment: points/NAME.pts (the
    first pixel is 1, as .pts files have it). attributes: probabilities.csv. All: drawn/NAME.jpg, and predictions.json
    (the first pixel is 0). An image with several faces has NAME-1, NAME-2, ... Use as a context manager: the summary is
    written at the end, and for what is done when the command is interrupted.

    Args:
        images: all that may come; an output is named after the path below their common folder.
    """

    def __init__(self, out: Path, predictor: Predictor, images: Sequence[Path], about: dict[str, Any]) -> None:
        self.out, self.predictor = out, predictor
        self.names = output_names(images)
        self.done: dict[str, list[dict[str, Any]]] = {}
        self.failed: dict[str, str] = {}
        self._about = about
        out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> PredictionFiles:
        return self

    def __exit__(self, *error: object) -> None:
        task, names = self.predictor.task.name, list(self.predictor.names)
        labels: dict[str, Any] = {}
        if task == "parsing":
            labels = {"classes": names, "colors": class_colors(len(names)).tolist()}
        elif task == "attributes":
            labels = {"attributes": names}
            self._write_csv()
        content = {"task": task, **self._about, **labels, "pixels": PIXELS, "images": self.done, "failed": self.failed}
        (self.out / "predictions.json").write_text(json.dumps(content, allow_nan=False) + "\n")

    def write(
        self,
        path: Path,
        image: NDArray[np.uint8],
        faces: Sequence[Face | None],
        values: Sequence[NDArray[Any]],
        crops: Sequence[NDArray[np.uint8]],
    ) -> None:
        """The predictions of one image.

        Args:
            image: RGB [H, W, 3]. faces: as they were given, None for the whole image. values: of each face, as
                `Predictor.predict` gives them. crops: RGB [S, S, 3] of each face.
        """
        name, task = self.names[path], self.predictor.task.name
        records = []
        for number, (face, value) in enumerate(zip(faces, values, strict=True), 1):
            record: dict[str, Any] = {key: array.tolist() for key, array in (face or {}).items()}
            own = name if len(faces) == 1 else f"{name}-{number}"
            if task == "parsing":
                record["mask"] = self._write_mask(own, value)
            elif task == "alignment":
                record["points"] = value.round(3).tolist()
                record["pts"] = self._write_pts(own, value)
            else:
                pairs = zip(self.predictor.names, value.tolist(), strict=True)
                record["probabilities"] = {key: round(probability, 6) for key, probability in pairs}
            records.append(record)
        self.done[str(path)] = records
        self._draw(image, faces, values, crops, path.name).save(self._file("drawn", name, "jpg"), quality=JPEG_QUALITY)

    def _draw(
        self,
        image: NDArray[np.uint8],
        faces: Sequence[Face | None],
        values: Sequence[NDArray[Any]],
        crops: Sequence[NDArray[np.uint8]],
        title: str,
    ) -> Image.Image:
        if self.predictor.task.name == "attributes" and values:
            titles = [title if len(values) == 1 else f"{title} {number}" for number in range(1, len(values) + 1)]
            samples = [{"image": crop, "name": text} for crop, text in zip(crops, titles, strict=True)]
            return draw_attributes.draw_sheet(samples, values, [math.nan] * len(values), self.predictor.names)
        if self.predictor.task.name == "parsing":
            for labels in values:
                image = overlay(image, labels, len(self.predictor.names))
        picture = Image.fromarray(image)
        if self.predictor.task.name == "alignment":
            for face, points in zip(faces, values, strict=True):
                draw_points(picture, points, face)
        return picture

    def _write_mask(self, name: str, labels: NDArray[np.uint8]) -> str:
        mask = Image.fromarray(labels)
        mask.putpalette(class_colors(len(self.predictor.names)).tobytes())
        file = self._file("masks", name, "png")
        mask.save(file, optimize=False)
        return file.relative_to(self.out).as_posix()

    def _write_pts(self, name: str, points: NDArray[np.float64]) -> str:
        lines = [f"{x:.3f} {y:.3f}" for x, y in points + PTS_ORIGIN]
        file = self._file("points", name, "pts")
        file.write_text(f"version: 1\nn_points: {len(points)}\n{{\n" + "\n".join(lines) + "\n}\n")
        return file.relative_to(self.out).as_posix()

    def _write_csv(self) -> None:
        with (self.out / "probabilities.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "face", *self.predictor.names])
            for path, records in self.done.items():
                for number, record in enumerate(records, 1):
                    writer.writerow([path, number, *(f"{p:.4f}" for p in record["probabilities"].values())])

    def _file(self, folder: str, name: str, kind: str) -> Path:
        file = self.out / folder / f"{name}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def output_names(images: Sequence[Path]) -> dict[Path, str]:
    """For each image its path below the folder that holds all, without extension unless two would be the same."""
    full = {path: Path(os.path.abspath(path)) for path in images}  # noqa: PTH100 - keeps the names of links
    common = os.path.commonpath([path.parent for path in full.values()])
    names = {path: absolute.relative_to(common) for path, absolute in full.items()}
    count = Counter(name.with_suffix("") for name in names.values())
    return {
        path: (name if count[name.with_suffix("")] > 1 else name.with_suffix("")).as_posix()
        for path, name in names.items()
    }


def draw_points(picture: Image.Image, points: NDArray[np.floating], face: Face | None) -> None:
    """Dots on an RGB picture, and the box of the face if one was given."""
    pen = ImageDraw.Draw(picture)
    extent = float((points.max(0) - points.min(0)).max()) if len(points) > 1 else min(picture.size) / 2
    radius = max(1.0, extent / 90)
    if face is not None and "box" in face:
        pen.rectangle([float(v) for v in face["box"]], outline=BETWEEN, width=max(1, round(radius / 2)))
    for x, y in points.tolist():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=FOUND)
