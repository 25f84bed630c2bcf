"""What an array file declares of its data, checked before the data is touched, and the way from there to values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from app.errors import InvalidImage, InvalidInput, InvalidLatent, MalformedBody
from app.wire.scan import Body

Values = npt.NDArray[np.float16 | np.float32]

_FLOATS = {"<f2": "float16", ">f2": "float16", "<f4": "float32", ">f4": "float32", "bf16": "float32"}
_OTHERS = {
    "f8": "float64",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "i8": "int64",
    "u1": "uint8",
    "u2": "uint16",
    "O": "objects",
}
_LONGEST = 2**31


@dataclass(frozen=True)
class Purpose:
    """What an array is read as: the dtypes that it may have, as they become, and the error of any other."""

    dtypes: Mapping[str, str]
    shapes: str
    error: type[InvalidInput]
    frames: bool = False
    """Whether (N, C, T, h, w) is read too, of one frame: as pipelines of clips have pictures."""
    clips: bool = False
    """Whether of that (1, C, T, h, w) may have more frames: it is read as (C, T, h, w)."""


LATENTS = Purpose(_FLOATS, "(C, h, w) or (N, C, h, w)", InvalidLatent, frames=True)
CLIPS = replace(LATENTS, shapes=f"{LATENTS.shapes}, or of a clip (1, C, T, h, w)", clips=True)
PIXELS = Purpose(
    _FLOATS | {"|u1": "uint8"},
    "(H, W, 3) or (N, H, W, 3) in uint8, (3, H, W) or (N, 3, H, W) in floats, or with alpha 4 for 3",
    InvalidImage,
)


@dataclass(frozen=True)
class ArraySpec:
    """An array whose data begins at byte `start` of its file; `array_spec` makes one."""

    shape: tuple[int, int, int, int]
    """(N, C, h, w); of `PIXELS` in uint8 (N, H, W, C)."""
    code: str
    """`<f2`, `>f2`, `<f4`, `>f4`, `|u1` as in .npy, or `bf16`."""
    start: int
    fortran: bool = False
    strides: tuple[int, int, int, int] | None = None
    """Steps in elements, of a view into more data; None where the data is dense."""
    clip: bool = False
    """Whether the shape is (C, T, h, w), and was said to be."""

    @property
    def dtype(self) -> str:
        """uint8, float16 or float32, as it is read: bfloat16, which numpy lacks, becomes float32."""
        return PIXELS.dtypes[self.code]

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * (2 if self.code == "bf16" else int(self.code[-1]))


def array_spec(
    shape: tuple[int, ...],
    code: str,
    start: int,
    *,
    fortran: bool = False,
    purpose: Purpose = LATENTS,
    strides: tuple[int, ...] | None = None,
) -> ArraySpec:
    """Checks a dtype and a shape of three or four sides, or five where one is of one frame; raises the purpose's error.

    `strides` are as many as sides.
    """
    if code not in purpose.dtypes:
        expected = " or ".join(dict.fromkeys(purpose.dtypes.values()))
        raise purpose.error(f"expected {expected}, got {_OTHERS.get(code.lstrip('<>|='), code)[:40]}")
    clip = False
    if purpose.frames and len(shape) == 5 and max(shape) < _LONGEST:
        clip = purpose.clips and shape[2] > 1
        if clip and shape[0] != 1:
            raise purpose.error(f"expected one clip, (1, C, T, h, w), got {shape[0]} in a shape of {shape}")
        if not clip and shape[2] != 1:
            where = "" if purpose.clips else ": clips are taken by POST /decode, as .npy or safetensors"
            raise purpose.error(f"expected one frame, (N, C, 1, h, w), got {shape[2]} in a shape of {shape}{where}")
        one = 0 if clip else 2
        shape = (*shape[:one], *shape[one + 1 :])
        strides = strides and (*strides[:one], *strides[one + 1 :])
    if len(shape) not in (3, 4) or max(shape) >= _LONGEST:
        raise purpose.error(f"expected a shape of {purpose.shapes}, got {str(shape)[:60]}")
    if min(shape) < 1:
        raise purpose.error(f"expected no dimension of 0, got a shape of {shape}")
    batch, channels, height, width = (1, *shape) if len(shape) == 3 else shape
    steps = None
    if strides is not None:
        n, c, y, x = (0, *strides) if len(strides) == 3 else strides
        steps = n, c, y, x
    return ArraySpec((batch, channels, height, width), code, start, fortran, steps, clip)


def check_size(spec: ArraySpec, size: int) -> None:
    """Compares the declaration with the file's `size` in bytes; raises MalformedBody."""
    if spec.nbytes != size - spec.start:
        raise MalformedBody(f"the header declares {spec.nbytes} bytes of data, {size - spec.start} are there")


def values(spec: ArraySpec, body: Body) -> Values:
    """The data in the spec's shape: native byte order, contiguous, writable, a copy that does not hold the body."""
    count = math.prod(spec.shape)
    if spec.strides is not None:
        count = 1 + sum((side - 1) * step for side, step in zip(spec.shape, spec.strides, strict=True))
    if spec.code == "bf16":  # the upper half of a float32
        halves = np.frombuffer(body, "<u2", count, spec.start)
        flat = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(body, spec.code, count, spec.start).astype(spec.dtype)
    if spec.strides is not None:  # `count` ends with the last element that they reach
        steps = [step * flat.itemsize for step in spec.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, spec.shape, steps), order="C")
    return np.ascontiguousarray(flat.reshape(spec.shape, order="F" if spec.fortran else "C"))
