"""Pictures out of a body, be it a picture file or an array: .npy or safetensors."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import InvalidImage
from app.wire.headers import PictureHeader, read_header
from app.wire.images import read_image
from app.wire.npy import npy_spec
from app.wire.scan import Body
from app.wire.sniff import PICTURES, sniff
from app.wire.spec import PIXELS, ArraySpec, values
from app.wire.tensors import safetensors_header

FURTHEST = 10.0
"""From 0, of pixels in [-1, 1] in floats: room for noise that is encoded, none for 0 .. 255."""

WORK = 20
"""Bytes for each number of an array: as it is read, in float32, its size, fitted, and a little."""


@dataclass(frozen=True)
class PixelsHeader:
    """What a body says of its pictures before any pixel is read."""

    declared: PictureHeader | ArraySpec

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of each."""
        if isinstance(self.declared, PictureHeader):
            return self.declared.shown
        _, *sides = self.declared.shape
        height, width = sides[:2] if self.declared.dtype == "uint8" else sides[1:]
        return width, height

    @property
    def count(self) -> int:
        """How many there are said to be."""
        return 1 if isinstance(self.declared, PictureHeader) else self.declared.shape[0]

    @property
    def frames(self) -> int:
        """Of a picture that moves, of which the first is read."""
        return self.declared.frames if isinstance(self.declared, PictureHeader) else 1

    @property
    def work(self) -> int:
        """Bytes of memory that reading takes at most."""
        if isinstance(self.declared, PictureHeader):
            return self.declared.work
        return WORK * math.prod(self.declared.shape)


def pixels_header(body: Body) -> PixelsHeader:
    """The header of a picture file or of an array.

    Raises UnsupportedMedia for what is neither, else as `read_header` or `array_header` does.
    """
    kind = sniff(body, (*PICTURES, "npy", "safetensors"))
    if kind in PICTURES:
        return PixelsHeader(read_header(body))
    return array_header(npy_spec(body, PIXELS) if kind == "npy" else safetensors_header(body, PIXELS)[0])


def array_header(spec: ArraySpec) -> PixelsHeader:
    """The header of an array of `PIXELS`; raises InvalidImage unless there are three channels in their place."""
    if spec.shape[3 if spec.dtype == "uint8" else 1] != 3:
        raise InvalidImage(f"expected a shape of {PIXELS.shapes}, got {spec.shape} in {spec.dtype}")
    return PixelsHeader(spec)


def read_pixels(
    body: Body, header: PixelsHeader, *, background: tuple[int, int, int], max_pixels: int
) -> list[npt.NDArray[Any]]:
    """The pictures of a body as (H, W, 3): one of a picture file, as `read_image`; of an array all that it holds.

    uint8 (H, W, 3) or (N, H, W, 3) in sRGB stay bytes. float16, bfloat16 or float32 (3, H, W) or (N, 3, H, W), with
    black at -1 and white at 1, become float32; InvalidImage where they are not finite, or far out of range.
    """
    spec = header.declared
    if isinstance(spec, PictureHeader):
        return [read_image(body, spec, background=background, max_pixels=max_pixels)]
    array = values(spec, body)
    if spec.dtype == "uint8":
        return list(array)
    most = np.abs(array).max()
    if not most <= FURTHEST:  # nor if it is NaN
        raise InvalidImage(f"expected finite pixels in [-1, 1], got {most:g} away from 0")
    return list(array.astype(np.float32, copy=False).transpose(0, 2, 3, 1))
