"""Latents out of a body: .npy, .npz or safetensors, always as a batch of finite numbers."""

from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from app.errors import InvalidLatent
from app.terms import Convention
from app.wire.npy import npy_spec
from app.wire.npz import npz_headers, read_npz
from app.wire.origin import Origin, read_origin
from app.wire.sniff import ARRAYS, sniff
from app.wire.spec import ArraySpec, Values, values
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
    origin: Origin | None = None
    """These three as a safetensors file says; None where it does not, and for .npy and .npz."""


@dataclass(frozen=True, eq=False)
class Latents:
    """A batch of latents (N, C, h, w), float16 or float32, finite, in memory of its own.

    The rest is what a safetensors file says of them: None where it does not, and for .npy and .npz.
    """

    array: Values
    family: str | None = None
    convention: Convention | None = None
    origin: Origin | None = None


def latent_shape(body: bytes) -> LatentShape:
    """The shape of the latents in a body, from its headers alone.

    Raises as `read_latents` does, except TooLarge and for values that are not finite.
    """
    match sniff(body, ARRAYS):
        case "npy":
            return _batch([npy_spec(body)])
        case "npz":
            return _batch(npz_headers(body))
        case _:
            spec, metadata = safetensors_header(body)
            convention = _convention(metadata.get("convention"))
            origin = read_origin(metadata)
            return replace(_batch([spec]), family=metadata.get("family"), convention=convention, origin=origin)


def read_latents(body: bytes, *, max_bytes: int) -> Latents:
    """The latents of a .npy, .npz or safetensors body: (C, h, w) or (N, C, h, w), float16, float32, or bfloat16.

    The arrays of a .npz must share a shape and are joined in name order. Raises UnsupportedMedia for other formats,
    MalformedBody where header and data disagree, TooLarge where a .npz would inflate to more than `max_bytes`, and
    InvalidLatent for other dtypes and shapes, for values that are not finite, and for unreadable metadata.
    """
    match sniff(body, ARRAYS):
        case "npy":
            return Latents(_finite(values(npy_spec(body), body)))
        case "npz":
            _batch(npz_headers(body))
            return Latents(_finite(np.concatenate(read_npz(body, max_bytes))))
        case _:
            spec, metadata = safetensors_header(body)
            return Latents(
                _finite(values(spec, body)),
                metadata.get("family"),
                _convention(metadata.get("convention")),
                read_origin(metadata),
            )


def _batch(parts: list[ArraySpec]) -> LatentShape:
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
