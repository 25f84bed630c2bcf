"""The .npy layout: a header of text, then the data. Reads the header without evaluating it; never unpickles."""

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import MalformedBody
from app.wire.arrays.spec import LATENTS, ArraySpec, Purpose, array_spec, check_size
from app.wire.scan import Body

MAX_HEADER = 4096
"""Bytes; the headers that numpy writes have 128."""

MAGIC = b"\x93NUMPY"
PREFIX = 12
"""Bytes up to the header's text, at most."""

_DESCR = re.compile(rb"""['"]descr['"]\s*:\s*['"]([^'"]*)['"]""")
_ORDER = re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)""")
_SHAPE = re.compile(rb"""['"]shape['"]\s*:\s*\(([0-9,\s]*)\)""")


def npy_length(begun: Body) -> int | None:
    """Bytes of a latent's .npy file that others may follow; None where these are too few to tell.

    Raises as `npy_header`.
    """
    if begun[:6] != MAGIC[: len(begun)]:
        raise MalformedBody(f"a .npy file begins with {MAGIC!r}, not with {bytes(begun[: len(MAGIC)])!r}")
    width = _width(begun)
    if len(begun) < PREFIX or len(begun) < min(_start(begun, width), MAX_HEADER):
        return None
    spec = npy_header(begun)
    return spec.start + spec.nbytes


def npy_header(body: Body, purpose: Purpose = LATENTS) -> ArraySpec:
    """What a .npy file, or the first `MAX_HEADER` bytes of one, declares.

    Raises MalformedBody where the header is not one, and the purpose's error for a dtype or shape that it doesn't have.
    """
    width = _width(body)
    start = _start(body, width)
    if body[:6] != MAGIC or not width or start > min(len(body), MAX_HEADER):
        raise MalformedBody(f"the .npy header is truncated, of an unknown version, or longer than {MAX_HEADER} bytes")
    header = body[8 + width : start]
    descr, order, shape = _DESCR.search(header), _ORDER.search(header), _SHAPE.search(header)
    if not (descr and order and shape):
        raise MalformedBody("the .npy header has no plain descr, fortran_order and shape")
    sides = tuple(int(side) for side in re.findall(rb"[0-9]+", shape[1]))
    return array_spec(sides, descr[1].decode("latin-1"), start, fortran=order[1] == b"True", purpose=purpose)


def _width(body: Body) -> int:
    """Bytes of the header's length, by the version; 0 of an unknown one."""
    return {1: 2, 2: 4, 3: 4}.get(body[6] if len(body) > 6 else 0, 0)


def _start(body: Body, width: int) -> int:
    """Where the data begins."""
    return 8 + width + int.from_bytes(body[8 : 8 + width], "little")


def npy_spec(body: Body, purpose: Purpose = LATENTS) -> ArraySpec:
    """What a whole .npy file declares; raises as `npy_header`, and MalformedBody where its data are not that long."""
    spec = npy_header(body, purpose)
    check_size(spec, len(body))
    return spec


def write_npy(array: npt.NDArray[Any]) -> bytes:
    """A .npy file of an array of any shape and plain dtype, in C order.

    The bytes are a copy of this array alone: a view of a batch does not keep the batch alive.
    """
    contiguous = np.ascontiguousarray(array)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(contiguous))
    return b"".join((file.getvalue(), contiguous.data))
