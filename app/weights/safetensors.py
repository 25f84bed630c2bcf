"""Tensors of a safetensors file: what its header says of them, checked against the dtypes that torch has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader

import torch
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.text import short
from app.weights.header import PREFIX, Entry, header_length, parse_header
from app.weights.rebuilds import LARGEST_SIDE, MOST_DIMS

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

HEADER_LIMIT = 100_000_000  # bytes of the header, the limit of the reference implementation


@dataclass(frozen=True)
class Stored:
    """One tensor, unread; `span` is (first, after the last) byte of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    span: tuple[int, int]

    def tensor(self, data: bytearray) -> Tensor:
        """The tensor of these bytes, whose memory it keeps."""
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.shape)


def read_safetensors(file: BufferedReader, size: int) -> tuple[dict[str, Stored], Mapping[str, str]]:
    """The tensors of a file of `size` bytes by key, and its metadata.

    Raises UnsupportedCheckpoint with a one-line reason.
    """
    file.seek(0)
    prefix = file.read(PREFIX)
    length = header_length(prefix)
    if len(prefix) < PREFIX or length > HEADER_LIMIT:
        raise UnsupportedCheckpoint(f"not a safetensors file: {size} bytes that begin with {prefix!r}")
    start = PREFIX + length
    if start > size:
        raise UnsupportedCheckpoint(f"truncated: header promises {start} bytes, file has {size}")
    try:
        header = parse_header(file.read(length))
    except ValueError as error:
        raise UnsupportedCheckpoint(f"not a safetensors file: {error}") from error
    stored = {key: _stored(key, entry, start) for key, entry in header.entries.items()}
    if (end := start + header.data_bytes) != size:
        wrong = "truncated" if end > size else "too long"
        raise UnsupportedCheckpoint(f"{wrong}: header promises {end} bytes, file has {size}")
    return stored, header.metadata


def _stored(key: str, entry: Entry, start: int) -> Stored:
    """Raises UnsupportedCheckpoint unless dtype, shape and bytes agree."""
    if entry.dtype not in DTYPES:
        raise UnsupportedCheckpoint(f"{short(key)} has dtype {short(entry.dtype)}, which is not known here")
    dtype = DTYPES[entry.dtype]
    sound = len(entry.shape) <= MOST_DIMS and all(side <= LARGEST_SIDE for side in entry.shape)
    if not sound or entry.end - entry.begin != math.prod(entry.shape) * dtype.itemsize:
        sides = short(str([*entry.shape[: MOST_DIMS + 1]]))
        raise UnsupportedCheckpoint(
            f"{short(key)} is {entry.dtype} of shape {sides}, but has bytes {entry.begin} to {entry.end}"
        )
    return Stored(dtype, entry.shape, (start + entry.begin, start + entry.end))
