"""The .npy layout: a header of text, then the data. Reads the header without evaluating it; never unpickles."""

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import MalformedBody
from app.wire.scan import Body
from app.wire.spec import LATENTS, ArraySpec, Purpose, array_spec, check_size

MAX_HEADER = 4096
"""Bytes; the headers that numpy writes have 128."""

_DESCR = re.compile(rb"""['"]descr['"]\s*:\s*['"]([^'"]*)['"]""")
_ORDER = re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)""")
_SHAPE = re.compile(rb"""['"]shape['"]\s*:\s*\(([0-9,\s]*)\)""")


def npy_header(body: Body, purpose: Purpose = LATENTS) -> ArraySpec:
    """What a .npy file, or the first `MAX_HEADER` bytes of one, declares.

    Raises MalformedBody where the header is not one, and the purpose's error for a dtype or shape that it doesn't have.
    """
    width = {1: 2, 2: 4, 3: 4}.get(body[6] if len(body) > 6 else 0, 0)  # of the header's length, by version
    start = 8 + width + int.from_bytes(body[8 : 8 + width], "little")
    if body[:6] != b"\x93NUMPY" or not width or start > min(len(body), MAX_HEADER):
        raise MalformedBody(f"the .npy header is truncated, of an unknown version, or longer than {MAX_HEADER} bytes")
    header = body[8 + width : start]
    descr, order, shape = _DESCR.search(header), _ORDER.search(header), _SHAPE.search(header)
    if not (descr and order and shape):
        raise MalformedBody("the .npy header has no plain descr, fortran_order and shape")
    sides = tuple(int(side) for side in re.findall(rb"[0-9]+", shape[1]))
    return array_spec(sides, descr[1].decode("latin-1"), start, fortran=order[1] == b"True", purpose=purpose)


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
