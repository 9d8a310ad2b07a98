"""`python -m farl.predict {parsing,alignment,attributes} CHECKPOINT IMAGES... --out DIR`, and `... export`."""

from __future__ import annotations

import glob
import inspect
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from farl import cli

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from farl.downstream.given_faces import Face
    from farl.downstream.prediction_files import PredictionFiles
    from farl.downstream.predictor import Predictor

PROG = "farl.predict"
TASKS = {
    "parsing": "a class for every pixel: masks as indexed PNG",
    "alignment": "landmarks: .pts files and JSON",
    "attributes": "yes-or-no attributes: probabilities as CSV and JSON",
}
EXPORT = "the network as an ONNX file, from the crop of a face"


@dataclass(frozen=True)
class PredictOptions:
    """Predict with a fine-tuned network and draw what was found.

    Broken images are named and the others go on; the exit code is then 1. Coordinates are pixels of the image turned
    upright as its EXIF says.
    """

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Run folder of farl.finetune, or its last.pt or best.pt."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES...")]
    """Image files, folders, or globs in quotes (** goes into folders)."""
    out: str = "predictions"
    """Folder for masks, points, probabilities and pictures."""
    faces: str = ""
    """CSV or JSON with the face boxes and/or five points of the images, several rows for several faces."""
    detector: str = ""
    """MODULE:FUNCTION that finds the faces of an RGB array. Without --faces and --detector whole images are taken."""
    batch: int = 8
    """Faces a forward pass."""
    threads: int = 2
    """Threads that read ahead."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU, fp32 on a CPU."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("missing IMAGES; see --help")
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be 1 or more")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}; use auto, cpu or cuda")
        if self.faces and self.detector:
            raise ValueError("give --faces or --detector, not both")


@dataclass(frozen=True)
class ExportOptions:
    """Write a fine-tuned network as one ONNX file, for any number of crops at a time, in fp32."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """Run folder of farl.finetune, or its last.pt or best.pt."""
    out: Annotated[Positional[str], arg(metavar="OUT.onnx")]
    """The file to write."""


def main(argv: list[str] | None = None) -> int | None:
    commands: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
        name: (partial(_main, name), text) for name, text in TASKS.items()
    }
    commands["export"] = (_export, EXPORT)
    return cli.subcommand(commands, argv, prog=PROG, description=str(inspect.getdoc(PredictOptions)))


def _main(name: str, argv: list[str]) -> int:
    description = f"{TASKS[name][0].upper()}{TASKS[name][1:]}.\n\n{inspect.getdoc(PredictOptions)}"
    options = cli.parse(PredictOptions, argv, prog=f"{PROG} {name}", description=description)
    failed, total = predict(name, options)
    if failed:
        print(f"{PROG} {name}: {failed} of {total} images could not be used", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _export(argv: list[str]) -> int:
    options = cli.parse(ExportOptions, argv, prog=f"{PROG} export", description=str(inspect.getdoc(ExportOptions)))
    from farl.downstream.network import load_network
    from farl.downstream.onnx_export import export_onnx

    task, network = load_network(options.checkpoint)
    file = export_onnx(task, network, options.out)
    print(f"{file}: {task.name}, crops of {task.protocol.crop} pixels")
    return 0


def predict(name: str, options: PredictOptions) -> tuple[int, int]:
    """Run the command: the numbers of images that failed and of all.

    Raises:
        ValueError: options, checkpoint or faces that do not fit, or no images. OSError: a file other than an image
            cannot be read or written.
    """
    from farl.downstream.prediction_files import PredictionFiles
    from farl.downstream.predictor import Predictor
    from farl.progress import Progress

    images = find_images(options.images)
    bf16 = {"auto": None, "fp32": False, "bf16": True}[options.precision]
    predictor = Predictor.load(options.checkpoint, device=options.device, batch=options.batch, bf16=bf16)
    if predictor.task.name != name:
        raise ValueError(
            f"{options.checkpoint} is a network for {predictor.task.name}: use {PROG} {predictor.task.name}"
        )
    find_faces = _face_finder(options, images, predictor)
    print(f"{name} of {len(images):,} images with {options.checkpoint} on {predictor.device}, to {options.out}")
    about = {"checkpoint": options.checkpoint, "faces_from": options.faces or options.detector or "whole images"}
    with (
        PredictionFiles(Path(options.out), predictor, images, about) as files,
        Progress(len(images), name, unit="images") as progress,
    ):
        for group in read_ahead(images, options.batch, options.threads):
            _predict_group(group, predictor, find_faces, files)
            progress.update(len(group))
    for message in files.failed.values():
        print(f"{PROG} {name}: {message}", file=sys.stderr, flush=True)
    return len(files.failed), len(images)


def _predict_group(
    group: list[tuple[Path, NDArray[np.uint8] | Exception]],
    predictor: Predictor,
    find_faces: Callable[[Path, NDArray[np.uint8]], Sequence[Face | None]],
    files: PredictionFiles,
) -> None:
    found: list[tuple[Path, Any, Sequence[Face | None]]] = []
    samples = []
    for path, image in group:
        try:
            if isinstance(image, Exception):
                raise image
            faces = find_faces(path, image)
            own = [predictor.sample(image, face, str(path)) for face in faces]
        except (ValueError, OSError) as error:
            message = cli.describe(error)
            files.failed[str(path)] = message if str(path) in message else f"{path}: {message}"
            continue
        found.append((path, image, faces))
        samples += own
    values: list[Any] = []
    crops: list[Any] = []
    for first in range(0, len(samples), predictor.batch):
        predictions, seen = predictor.predict(samples[first : first + predictor.batch])
        values += predictions
        crops += list((seen * 255).round().byte().movedim(1, -1).cpu().numpy())
    for path, image, faces in found:
        count = len(faces)
        files.write(path, image, faces, values[:count], crops[:count])
        del values[:count], crops[:count]


def _face_finder(
    options: PredictOptions, images: Sequence[Path], predictor: Predictor
) -> Callable[[Path, NDArray[np.uint8]], Sequence[Face | None]]:
    from farl.downstream.given_faces import FaceList, load_detector

    if options.detector:
        detector = load_detector(options.detector)
        return lambda path, image: detector(image)
    if options.faces:
        listed = FaceList(options.faces)
        named = sum(listed.of(path) is not None for path in images)
        if not named:
            raise ValueError(f"--faces {options.faces} names none of the images, such as {images[0]}")
        if named < len(images):
            print(f"{options.faces} names {named:,} of {len(images):,} images; the others are taken whole")
        return lambda path, image: [None] if (faces := listed.of(path)) is None else faces
    if predictor.needs_face:
        raise ValueError("the crops of this model are made from five points: give --faces FILE or --detector")
    print("no --faces and no --detector: each whole image is taken as the crop of one face")
    return lambda path, image: [None]


def find_images(words: Sequence[str]) -> list[Path]:
    """Files, images of folders, and what globs match: in the order of the words, each once.

    A named file is taken as it is; whether it can be read turns out later. ValueError: a folder or glob without images.
    """
    from farl.downstream.image_files import EXTENSIONS

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()

    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            members = sorted(filter(is_image, path.iterdir()))
        elif not path.exists() and glob.has_magic(word):
            members = sorted(filter(is_image, map(Path, glob.glob(word, recursive=True))))  # noqa: PTH207 - absolute too
        else:
            members = [path]
        if not members:
            raise ValueError(f"{word} holds no images ({' '.join(EXTENSIONS)})")
        found.update(dict.fromkeys(members))
    return list(found)


def read_ahead(
    images: Sequence[Path], group: int, threads: int
) -> Generator[list[tuple[Path, NDArray[np.uint8] | Exception]], None, None]:
    """Groups of images with their pixels, or with the ValueError or OSError that reading gave; one group ahead."""
    from farl.downstream.image_files import read_image

    def read(path: Path) -> Any:
        try:
            return read_image(path)
        except (ValueError, OSError) as error:
            return error

    waiting: deque[list[tuple[Path, Future[Any]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        for first in range(0, len(images), group):
            waiting.append([(path, pool.submit(read, path)) for path in images[first : first + group]])
            if len(waiting) > 1:
                yield [(path, future.result()) for path, future in waiting.popleft()]
        while waiting:
            yield [(path, future.result()) for path, future in waiting.popleft()]


if __name__ == "__main__":
    cli.run(main, PROG)
