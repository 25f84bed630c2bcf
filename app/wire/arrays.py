"""Latents out of a body: .npy, .npz or safetensors, always as a batch of finite numbers."""

import re
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from app.errors import InvalidLatent
from app.terms import Convention
from app.wire.declared import Declared, Values, check_size, values
from app.wire.npy import npy_header
from app.wire.npz import npz_headers, read_npz
from app.wire.scan import Body
from app.wire.sniff import ARRAYS, sniff
from app.wire.tensors import safetensors_header


@dataclass(frozen=True)
class LatentShape:
    """What a body declares of its latents before their data is touched."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: str
    """`float16` or `float32`, as they are read."""
    family: str | None = None
    convention: Convention | None = None
    """These two as a safetensors file says; None where it does not, and for .npy and .npz."""

    @property
    def work(self) -> int:
        """Bytes of memory that reading and judging the latents take at most: a few float64 copies of one item."""
        return self.batch * self.channels * self.height * self.width * 32


@dataclass(frozen=True, eq=False)
class Latents:
    """A batch of latents (N, C, h, w), float16 or float32, finite, in memory of its own.

    The rest is what a safetensors file says of them: None where it does not, and for .npy and .npz.
    """

    array: Values
    model: str | None = None
    sha256: str | None = None
    family: str | None = None
    convention: Convention | None = None
    image_size: tuple[int, int] | None = None
    """(width, height) in pixels of the picture that was encoded."""


def latent_shape(body: Body) -> LatentShape:
    """The shape of the latents in a body, from its headers alone.

    Raises as `read_latents` does, except TooLarge and for values that are not finite.
    """
    match sniff(body, ARRAYS):
        case "npy":
            return _batch([_npy(body)])
        case "npz":
            return _batch(npz_headers(body))
        case _:
            declared, metadata = safetensors_header(body)
            convention = _convention(metadata.get("convention"))
            return replace(_batch([declared]), family=metadata.get("family"), convention=convention)


def read_latents(body: Body, *, max_bytes: int) -> Latents:
    """The latents of a .npy, .npz or safetensors body: (C, h, w) or (N, C, h, w), float16, float32, or bfloat16.

    The arrays of a .npz must share a shape and are joined in name order. Raises UnsupportedMedia for other formats,
    MalformedBody where header and data disagree, TooLarge where a .npz would inflate to more than `max_bytes`, and
    InvalidLatent for other dtypes and shapes, for values that are not finite, and for unreadable metadata.
    """
    match sniff(body, ARRAYS):
        case "npy":
            return Latents(_finite(values(_npy(body), body)))
        case "npz":
            _batch(npz_headers(body))
            return Latents(_finite(np.concatenate(read_npz(body, max_bytes))))
        case _:
            declared, metadata = safetensors_header(body)
            return Latents(
                _finite(values(declared, body)),
                metadata.get("model"),
                metadata.get("sha256"),
                metadata.get("family"),
                _convention(metadata.get("convention")),
                _image_size(metadata.get("image_size")),
            )


def _npy(body: Body) -> Declared:
    declared = npy_header(body)
    check_size(declared, len(body))
    return declared


def _batch(parts: list[Declared]) -> LatentShape:
    shapes = sorted({part.shape for part in parts})
    if len(shapes) > 1:
        raise InvalidLatent(f"expected arrays of one shape in the .npz, got {shapes[0]} and {shapes[1]}")
    batch, channels, height, width = shapes[0]
    dtype = "float32" if any(part.dtype == "float32" for part in parts) else "float16"
    return LatentShape(batch * len(parts), channels, height, width, dtype)


def _finite(array: Values) -> Values:
    finite = np.isfinite(array)
    if not finite.all():
        first = tuple(int(index) for index in np.unravel_index(np.argmin(finite), array.shape))
        bad = array.size - np.count_nonzero(finite)
        raise InvalidLatent(f"{bad} of {array.size} values are NaN or infinite, the first at (n, c, y, x) = {first}")
    return array


def _convention(text: str | None) -> Convention | None:
    if text not in (None, "scaled", "raw"):
        raise InvalidLatent(f"expected the metadata's convention to be scaled or raw, got {text[:40]!r}")
    return cast(Convention | None, text)


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    size = re.fullmatch("([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if size is None:
        raise InvalidLatent(f"expected the metadata's image_size as WIDTHxHEIGHT, got {text[:40]!r}")
    return int(size[1]), int(size[2])
