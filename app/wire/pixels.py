"""Pictures out of a body, be it a picture file or an array: .npy or safetensors."""

from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import InvalidImage, TooLarge
from app.wire.images import image_size, read_image
from app.wire.npy import npy_spec
from app.wire.sniff import PICTURES, sniff
from app.wire.spec import PIXELS, ArraySpec, values
from app.wire.tensors import safetensors_header

FURTHEST = 10.0
"""From 0, of pixels in [-1, 1] in floats: room for noise that is encoded, none for 0 .. 255."""

MAX_PICTURES = 1 << 16
"""Of one array: more than any queue has room for."""

_READ = (*PICTURES, "npy", "safetensors")


def picture_sizes(body: bytes) -> list[tuple[int, int]]:
    """(width, height) in pixels of each picture in a body, from its headers alone.

    Raises UnsupportedMedia for what is neither, MalformedBody where no size is found or header and data disagree, and
    InvalidImage for arrays that `read_pixels` does not take; their values are not looked at.
    """
    kind = sniff(body, _READ)
    if kind in PICTURES:
        return [image_size(body)]
    return sizes_of(_spec(kind, body))


def read_pixels(
    body: bytes, *, background: tuple[int, int, int], max_pixels: int
) -> list[npt.NDArray[np.uint8 | np.float32]]:
    """The pictures of a body as (H, W, 3): one of a picture file, as `read_image`; of an array all that it holds.

    uint8 (H, W, 3) or (N, H, W, 3) in sRGB stay bytes. float16, bfloat16 or float32 (3, H, W) or (N, 3, H, W), with
    black at -1 and white at 1, become float32. Raises as `picture_sizes`, `read_image` and `pictures_of` do.
    """
    kind = sniff(body, _READ)
    if kind in PICTURES:
        return [read_image(body, background=background, max_pixels=max_pixels)]
    return pictures_of(_spec(kind, body), body)


def sizes_of(spec: ArraySpec) -> list[tuple[int, int]]:
    """(width, height) of each picture in an array of `PIXELS`; raises InvalidImage for other channels, TooLarge."""
    count, *sides = spec.shape
    height, width, channels = sides if spec.dtype == "uint8" else (*sides[1:], sides[0])
    if channels != 3:
        raise InvalidImage(f"expected a shape of {PIXELS.shapes}, got {tuple(spec.shape)} in {spec.dtype}")
    if count > MAX_PICTURES:
        raise TooLarge(f"{count} pictures in one array; at most {MAX_PICTURES} are read")
    return [(width, height)] * count


def pictures_of(spec: ArraySpec, body: bytes) -> list[npt.NDArray[Any]]:
    """The pictures (H, W, 3) of such an array; raises as `sizes_of`, and InvalidImage for floats far out of range."""
    sizes_of(spec)
    array = values(spec, body)
    if spec.dtype == "uint8":
        return list(array)
    most = np.abs(array).max()
    if not most <= FURTHEST:  # nor if it is NaN
        raise InvalidImage(f"expected finite pixels in [-1, 1], got {most:g} away from 0")
    return list(array.astype(np.float32, copy=False).transpose(0, 2, 3, 1))


def _spec(kind: str, body: bytes) -> ArraySpec:
    return npy_spec(body, PIXELS) if kind == "npy" else safetensors_header(body, PIXELS)[0]
