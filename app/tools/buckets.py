"""Buckets as trainers have them: sizes of about one area, in steps, and where in its bucket a picture comes to lie.

A picture keeps its aspect, is resized until it covers the bucket of the nearest aspect, and is cut about its centre.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.errors import InvalidInput

Size = tuple[int, int]
"""(width, height) in pixels."""

LEAST, MOST = 256, 1024
"""Sides of buckets where nothing else is said, as sd-scripts has them."""
LONGEST = 8192
_SPEC = re.compile(r"(\d{1,5})x(\d{1,5}):(\d{1,4})(?::(\d{1,5})-(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True)
class Cut:
    """How one picture becomes one of its bucket's size."""

    original: Size
    resized: Size  # covers the bucket
    bucket: Size

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what is kept of the resized picture."""
        left, top = ((long - short) // 2 for long, short in zip(self.resized, self.bucket, strict=True))
        return left, top, left + self.bucket[0], top + self.bucket[1]


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are given."""

    text: str
    step: int
    sizes: tuple[Size, ...]

    def cut(self, width: int, height: int) -> Cut:
        """The bucket of the nearest aspect; a picture that has a bucket's size stays as it is."""
        original = width, height
        bucket = original if original in self.sizes else min(self.sizes, key=lambda size: _apart(size, original))
        wide, high = bucket
        scale = high / height if width / height > wide / high else wide / width
        return Cut(original, (int(width * scale + 0.5), int(height * scale + 0.5)), bucket)


def parse_buckets(text: str) -> Buckets:
    """Of `1024x1024:64`, an area and a step, or `1024x1024:64:256-2048`, and the range of sides.

    Raises InvalidInput.
    """
    found = _SPEC.fullmatch(text)
    if found is None:
        raise InvalidInput(f"buckets are WxH:STEP or WxH:STEP:LEAST-MOST, as 1024x1024:64; not {text[:100]!r}")
    width, height, step = (int(number) for number in found.groups()[:3])
    if step < 8 or not step <= min(width, height) <= max(width, height) <= LONGEST:
        raise InvalidInput(f"buckets take a step of 8 or more and sides from one step to {LONGEST}; not {text}")
    if found[4] is None:
        least, most = min(LEAST, width, height), max(MOST, width, height)
        least, most = least + -least % step, most - most % step
    else:
        least, most = int(found[4]), int(found[5])
        if least % step or most % step or not step <= least <= math.isqrt(width * height) <= most <= LONGEST:
            raise InvalidInput(
                f"the sides of buckets range over multiples of {step} about {math.isqrt(width * height)}; not {text}"
            )
    return Buckets(text, step, _sizes(width * height, step, least, most))


def cut_picture(picture: npt.NDArray[np.uint8], cut: Cut) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, 3) to the bucket's size: by the mean of areas where it shrinks, by Lanczos where it grows."""
    height, width = picture.shape[:2]
    left, top, right, bottom = cut.box
    across, down = width / cut.resized[0], height / cut.resized[1]
    shrinks = width >= cut.resized[0] and height >= cut.resized[1]
    kernel = Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS
    # Only what is kept is computed: a picture of one row, resized to cover, would be a wall.
    box = (left * across, top * down, min(width, right * across), min(height, bottom * down))
    return np.array(Image.fromarray(picture).resize(cut.bucket, kernel, box))


def _sizes(area: int, step: int, least: int, most: int) -> tuple[Size, ...]:
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, area // width // step * step)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def _apart(a: Size, b: Size) -> float:
    return abs(a[0] / a[1] - b[0] / b[1])
