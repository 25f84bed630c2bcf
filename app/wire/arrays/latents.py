"""Latents out of a body: .npy, .npz, safetensors or torch.save's, of one shape or of several, always finite numbers."""

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from app.errors import InvalidLatent
from app.terms import Convention
from app.wire.arrays.npy import npy_spec
from app.wire.arrays.npz import npz_headers, read_npz
from app.wire.arrays.saved import read_saved, saved_headers
from app.wire.arrays.spec import LATENTS, ArraySpec, Purpose, Values, values
from app.wire.arrays.tensors import safetensors_header
from app.wire.origin import Origin, read_origin
from app.wire.scan import Body
from app.wire.sniff import ARRAYS, sniff


@dataclass(frozen=True)
class LatentShape:
    """What a body declares of its latents before their data is touched."""

    parts: tuple[tuple[int, int, int, int], ...]
    """(N, C, h, w) of each array, in order."""
    dtype: str
    """`float16` or `float32`, as they are read."""
    family: str | None = None
    convention: Convention | None = None
    origin: Origin | None = None
    """These three as a safetensors file says; None where it does not, and for other files."""
    clip: bool = False
    """Whether they are said to be a clip: then there is one part, (C, T, h, w)."""
    cached: bool = False
    """Whether sd-scripts wrote them to train with: in the convention that it has for the family."""

    @property
    def batch(self) -> int:
        """How many latents there are said to be."""
        return sum(part[0] for part in self.parts)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of each latent. As many as the body claims: check `batch` first."""
        return [part[1:] for part in self.parts for _ in range(part[0])]

    @property
    def work(self) -> int:
        """Bytes of memory that reading and judging the latents take at most: a few float64 copies of one item."""
        return 32 * sum(math.prod(part) for part in self.parts)


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents (C, h, w), all float16 or all float32, finite, in memory of their own.

    The rest is what a safetensors file says of them: None where it does not, and for other files.
    """

    items: list[Values]
    family: str | None = None
    convention: Convention | None = None
    origin: Origin | None = None


def latent_shape(body: Body, purpose: Purpose = LATENTS) -> LatentShape:
    """The shape of the latents in a body, from its headers alone. Of `CLIPS` it may be a clip.

    Raises as `read_latents` does, except TooLarge and for values that are not finite.
    """
    match sniff(body, ARRAYS):
        case "npy":
            return _shape([npy_spec(body, purpose)])
        case "npz":
            specs, cached = npz_headers(body)
            return replace(_shape(specs), cached=cached)
        case "pt":
            return _shape(saved_headers(body))
        case _:
            spec, metadata = safetensors_header(body, purpose)
            convention = _convention(metadata.get("convention"))
            origin = read_origin(metadata)
            return replace(_shape([spec]), family=metadata.get("family"), convention=convention, origin=origin)


def read_latents(body: Body, *, max_bytes: int, purpose: Purpose = LATENTS) -> Latents:
    """The latents of a body in one of the formats `ARRAYS`: (C, h, w) or (N, C, h, w), float16, float32, or bfloat16.

    The arrays of a .npz follow each other in name order, and may differ in shape, as the tensors of a list of
    torch.save's. Raises UnsupportedMedia for other formats, MalformedBody where header and data disagree, TooLarge
    where a .npz would inflate to more than `max_bytes`, or tensors that share their data would take more, and
    InvalidLatent for other dtypes and shapes, for values that are not finite, and for unreadable metadata. Of `CLIPS` a
    clip comes as its channels, (T, h, w) each.
    """
    match sniff(body, ARRAYS):
        case "npy":
            return Latents(finite_items([values(npy_spec(body, purpose), body)]))
        case "npz":
            return Latents(finite_items(read_npz(body, max_bytes)))
        case "pt":
            return Latents(finite_items(read_saved(body, max_bytes)))
        case _:
            spec, metadata = safetensors_header(body, purpose)
            return Latents(
                finite_items([values(spec, body)]),
                metadata.get("family"),
                _convention(metadata.get("convention")),
                read_origin(metadata),
            )


def _shape(parts: list[ArraySpec]) -> LatentShape:
    dtype = "float32" if any(part.dtype == "float32" for part in parts) else "float16"
    return LatentShape(tuple(part.shape for part in parts), dtype, clip=parts[0].clip)


def finite_items(arrays: list[Values]) -> list[Values]:
    """The latents of arrays (N, C, h, w), in the wider dtype of all. Raises InvalidLatent unless they are finite."""
    bad, first, index = 0, None, 0
    for array in arrays:
        finite = np.isfinite(array)
        if not finite.all():
            bad += array.size - int(np.count_nonzero(finite))
            n, *at = (int(each) for each in np.unravel_index(np.argmin(finite), array.shape))
            first = first or (index + n, *at)
        index += len(array)
    if bad:
        total = sum(array.size for array in arrays)
        raise InvalidLatent(f"{bad} of {total} values are NaN or infinite, the first at (n, c, y, x) = {first}")
    dtype = np.result_type(*arrays)
    return [item for array in arrays for item in array.astype(dtype, copy=False)]


def _convention(text: str | None) -> Convention | None:
    if text not in (None, "scaled", "raw"):
        raise InvalidLatent(f"expected the metadata's convention to be scaled or raw, got {text[:40]!r}")
    return cast(Convention | None, text)
