"""Pictures out of a body, be it a picture file or an array: .npy or safetensors."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import InvalidImage
from app.wire.arrays.npy import npy_spec
from app.wire.arrays.spec import PIXELS, ArraySpec, values
from app.wire.arrays.tensors import safetensors_header
from app.wire.headers import PictureHeader, read_header
from app.wire.images import Colour, read_image
from app.wire.scan import Body
from app.wire.sniff import PICTURES, sniff

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
    def alpha(self) -> bool:
        """Whether it is an array of pictures with alpha; files have it or not, and are read either way."""
        return isinstance(self.declared, ArraySpec) and _channels(self.declared) == 4

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
    """The header of an array of `PIXELS`; raises InvalidImage unless three or four channels are in their place."""
    if _channels(spec) not in (3, 4):
        raise InvalidImage(f"expected a shape of {PIXELS.shapes}, got {spec.shape} in {spec.dtype}")
    return PixelsHeader(spec)


def check_channels(header: PixelsHeader, channels: int) -> None:
    """Raises InvalidImage for an array with alpha where pictures of 3 channels are taken."""
    if header.alpha and channels == 3:
        raise InvalidImage("the pictures have alpha, which this model does not take: expected 3 channels, got 4")


def read_pixels(
    body: Body, header: PixelsHeader, *, background: Colour | None, max_pixels: int
) -> list[npt.NDArray[Any]]:
    """The pictures of a body as (H, W, 3): one of a picture file, as `read_image`; of an array all that it holds.

    uint8 (H, W, 3) or (N, H, W, 3) in sRGB stay bytes. float16, bfloat16 or float32 (3, H, W) or (N, 3, H, W), with
    black at -1 and white at 1, become float32; InvalidImage where they are not finite, or far out of range. Without
    a background all come out as (H, W, 4), those without alpha opaque; with one, see `check_channels`.
    """
    spec = header.declared
    if isinstance(spec, PictureHeader):
        return [read_image(body, spec, background=background, max_pixels=max_pixels)]
    array = values(spec, body)
    if background is None and not header.alpha:
        array = _opaque(array)
    if spec.dtype == "uint8":
        return list(array)
    most = np.abs(array).max()
    if not most <= FURTHEST:  # nor if it is NaN
        raise InvalidImage(f"expected finite pixels in [-1, 1], got {most:g} away from 0")
    return list(array.astype(np.float32, copy=False).transpose(0, 2, 3, 1))


def _channels(spec: ArraySpec) -> int:
    return spec.shape[3 if spec.dtype == "uint8" else 1]


def _opaque(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pictures of three channels with a fourth that is 255, or in floats 1."""
    more = ((0, 0), (0, 0), (0, 0), (0, 1)) if array.dtype == np.uint8 else ((0, 0), (0, 1), (0, 0), (0, 0))
    return np.pad(array, more, constant_values=255 if array.dtype == np.uint8 else 1)
