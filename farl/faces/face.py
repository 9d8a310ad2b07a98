"""`draw`: one face of the embedded set, by seed and index."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farl.faces.attributes import attributes_of
from farl.faces.backdrop import paint_background, paint_body
from farl.faces.captions import caption_of
from farl.faces.covers import paint_cover
from farl.faces.features import landmarks
from farl.faces.features_paint import paint_face
from farl.faces.hair import HairPainter
from farl.faces.hairstyles import paint_back_hair, paint_front_hair
from farl.faces.hats import paint_hat, paint_hat_back
from farl.faces.scene import Scene, make_scene
from farl.faces.traits import Traits, sample
from farl.faces.wear import paint_earrings, paint_glasses

CLASSES = (
    "background",
    "skin",
    "left_brow",
    "right_brow",
    "left_eye",
    "right_eye",
    "nose",
    "upper_lip",
    "inner_mouth",
    "lower_lip",
    "hair",
)


@dataclass(frozen=True)
class Face:
    """One picture and everything that is known about it.

    Attributes:
        index: number of the face; with the seed it decides everything.
        image: uint8 [S, S, 3], sRGB.
        mask: uint8 [S, S], classes of LaPa in LaPa's order (`CLASSES`); left and right are the picture's. Skin has
            the ears but not the neck; hats, scarves, masks, hands and sunglasses are background.
        landmarks: float32 [68, 2] (x, y) in the iBUG order, pixel centres at whole numbers. Points under a hat, mask
            or hand are where they would be; a point can lie outside the picture.
        attributes: name -> whether it can be seen.
        caption: one lower-case line.
        jpeg_quality: what `jpeg` uses.
        traits: what it was drawn from.
    """

    index: int
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    landmarks: NDArray[np.float32]
    attributes: dict[str, bool]
    caption: str
    jpeg_quality: int
    traits: Traits

    def jpeg(self) -> bytes:
        """The image as a JPEG file of this face's own quality."""
        return _encoded(self.image, "JPEG", quality=self.jpeg_quality)

    def mask_png(self) -> bytes:
        """The mask as an 8-bit grey PNG whose values are class numbers."""
        return _encoded(self.mask, "PNG")


def _encoded(pixels: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def draw(index: int, *, seed: int = 0, size: int = 128) -> Face:
    """Draws face `index`: the same (index, seed, size) give the same face, in any process and order.

    The person, the caption and the attributes do not depend on `size`.

    Raises:
        ValueError: a negative index or seed, or a size outside 32..1024.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must not be negative, got index {index} and seed {seed}")
    if not 32 <= size <= 1024:
        raise ValueError(f"size must be 32 to 1024 pixels, got {size}")
    person, words, brush = (np.random.default_rng([seed, index, stream]) for stream in range(3))
    traits = sample(person)
    scene = render(traits, size, brush)
    points = scene.pose.pixels(landmarks(scene.head, scene.worried)) - np.float32(0.5)
    return Face(
        index=index,
        image=(np.clip(scene.canvas.image, 0, 1) * 255 + 0.5).astype(np.uint8),
        mask=scene.canvas.labels,
        landmarks=points.astype(np.float32),
        attributes=attributes_of(traits),
        caption=caption_of(traits, words),
        jpeg_quality=traits.jpeg_quality,
        traits=traits,
    )


def render(traits: Traits, size: int, rng: np.random.Generator) -> Scene:
    """Paints a person; back to front."""
    scene = make_scene(traits, size, rng)
    hair = HairPainter(scene)
    paint_background(scene)
    paint_hat_back(scene)
    paint_back_hair(scene, hair)
    paint_body(scene)
    paint_face(scene)
    paint_earrings(scene)
    paint_front_hair(scene, hair)
    paint_glasses(scene)
    paint_hat(scene)
    paint_cover(scene)
    return scene
