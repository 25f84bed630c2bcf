"""Fits a picture to a network that only takes sizes which are multiples of its spatial factor."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.errors import InvalidImage

Fit = Literal["pad", "crop", "resize", "error"]


def fitted_size(width: int, height: int, multiple: int, mode: Fit) -> tuple[int, int]:
    """(width, height) in pixels of what `fit` makes of a picture of this size; raises what it raises."""
    if height % multiple == 0 and width % multiple == 0:
        return width, height
    if mode == "error":
        raise InvalidImage(f"expected sides that are multiples of {multiple}, got {width}x{height}")
    if mode == "crop" and min(height, width) < multiple:
        raise InvalidImage(f"a picture of {width}x{height} has no {multiple}x{multiple} pixels to crop to")
    if mode == "pad":
        return width + -width % multiple, height + -height % multiple
    if mode == "crop":
        return width - width % multiple, height - height % multiple
    return _nearest(width, multiple), _nearest(height, multiple)


def fit(image: npt.NDArray[Any], multiple: int, mode: Fit) -> npt.NDArray[Any]:
    """A picture (H, W, 3) with both sides made multiples of `multiple` pixels; as it is where they already are.

    `pad` repeats the last row below and the last column to the right, `crop` keeps the centre, `resize` goes to the
    nearest multiple with Lanczos, `error` refuses. Raises InvalidImage in that last case, and for a picture that has
    nothing left to crop.
    """
    height, width, _ = image.shape
    to_width, to_height = fitted_size(width, height, multiple, mode)
    if (to_width, to_height) == (width, height):
        return image
    if mode == "pad":
        return np.pad(image, ((0, to_height - height), (0, to_width - width), (0, 0)), mode="edge")
    if mode == "resize":
        return resized(image, (to_width, to_height))
    top, left = (height - to_height) // 2, (width - to_width) // 2
    return image[top : top + to_height, left : left + to_width]


def resized(picture: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """A picture (H, W, 3), uint8, uint16, float16 or float32, in (width, height) `size`, by Lanczos.

    Floats may come out a little beyond the range that they were in, as Lanczos has it.
    """
    if picture.dtype == np.uint8:
        return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    channels = [  # Pillow has neither 16 bits nor floats in RGB
        np.array(Image.fromarray(picture[..., channel].astype(np.float32)).resize(size, Image.Resampling.LANCZOS))
        for channel in range(picture.shape[2])
    ]
    stacked = np.stack(channels, axis=-1)
    if picture.dtype.kind == "u":
        stacked = stacked.round().clip(0, np.iinfo(picture.dtype).max)
    return stacked.astype(picture.dtype)


def _nearest(side: int, multiple: int) -> int:
    return max(1, (side + multiple // 2) // multiple) * multiple
