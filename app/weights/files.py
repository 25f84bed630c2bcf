"""The file formats of weights: what is in a file without reading its tensors, and the tensors one by one.

safetensors is parsed and read here with plain reads: no mapping, so a file truncated under our feet is an error and
never a SIGBUS. Format: github.com/huggingface/safetensors, README, "Format". What torch.save writes is the business of
`archives` and `pickles`, which run no code of the file.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.text import short
from app.weights.archives import Archive, check_there, read_archive, read_tensor
from app.weights.rebuilds import LARGEST_SIDE, MOST_DIMS, TensorRef, kind

Format = Literal["safetensors", "ckpt", "pt", "pth", "bin", "diffusers"]

SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".ckpt": "ckpt",
    ".pt": "pt",
    ".pth": "pth",
    ".bin": "bin",
}

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

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

HEADER_LIMIT = 100_000_000  # bytes of a safetensors header, the limit of the reference implementation
MOST_PARTS = 1 << 20  # lists, objects and elements in it, as of 100 000 tensors: of any more, JSON may take gigabytes
MOST_LEVELS = 16  # of dicts around a state dict; a pickle may hold itself


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, unread."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0  # bytes from the beginning of a safetensors file; pickles find their own


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors by key, and the text metadata of a safetensors file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    """What a pickle has under its other keys, as `a sparse tensor`: what cannot be read is no fault until needed."""


def read_header(path: Path) -> Header:
    """The keys, dtypes and shapes of a file, without its tensors.

    Raises UnsupportedCheckpoint with a one-line reason for whatever cannot be read.
    """
    try:
        if _is_safetensors(path):
            return _safetensors_header(path)
        with path.open("rb") as file:
            archive = read_archive(file)
    except OSError as error:
        raise UnsupportedCheckpoint(f"cannot be read: {error.strerror or error}") from error
    tensors, others = _unwrap(archive)
    return Header({key: TensorInfo(ref.dtype, ref.shape) for key, ref in tensors.items()}, others=others)


def read_tensors(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor on the host) one at a time, each in memory of its own; no other key's bytes are read.

    Raises UnsupportedCheckpoint when a key is not there, is no dense tensor, or the file cannot be read.
    """
    try:
        if _is_safetensors(path):
            yield from _read_safetensors(path, keys)
        else:
            yield from _read_archive(path, keys)
    except OSError as error:
        raise UnsupportedCheckpoint(f"cannot be read: {error.strerror or error}") from error


def _is_safetensors(path: Path) -> bool:
    if path.suffix.lower() in (".safetensors", ".sft"):
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # some programs give safetensors a pickle's suffix


def _safetensors_header(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > HEADER_LIMIT:
            raise UnsupportedCheckpoint(f"not a safetensors file: {size} bytes that begin with {prefix!r}")
        text = file.read(length)
    if len(text) < length:
        raise UnsupportedCheckpoint(f"truncated: header promises {8 + length} bytes, file has {size}")
    if sum(text.count(mark) for mark in (b"[", b"{", b",")) > MOST_PARTS:
        raise UnsupportedCheckpoint(f"refused: its header of {length} bytes has more than {MOST_PARTS} parts")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(
            f"not a safetensors file: its header is no JSON ({type(error).__name__})"
        ) from error
    if not isinstance(entries, dict):
        raise UnsupportedCheckpoint("not a safetensors file: its header is no JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise UnsupportedCheckpoint("not a safetensors file: its metadata is no JSON object")
    end = 8 + length
    tensors: dict[str, TensorInfo] = {}
    spans = sorted((_span(key, entry), key, entry) for key, entry in entries.items())
    for (begin, after), key, entry in spans:
        if 8 + length + begin != end:
            raise UnsupportedCheckpoint(f"the data of {short(key)} overlaps another tensor or leaves a gap")
        tensors[key] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), offset=end)
        end = 8 + length + after
    if end != size:
        kind = "truncated" if end > size else "too long"
        raise UnsupportedCheckpoint(f"{kind}: header promises {end} bytes, file has {size}")
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def _span(key: str, entry: object) -> tuple[int, int]:
    """(begin, end) of a tensor's bytes after the header; raises UnsupportedCheckpoint unless all fields agree."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedCheckpoint(f"not a safetensors file: {short(key)} is no UTF-8") from error
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if dtype not in DTYPES:
                raise UnsupportedCheckpoint(f"{short(key)} has dtype {short(dtype)}, which is not known here")
            sound = begin >= 0 and len(shape) <= MOST_DIMS
            sound = sound and all(type(side) is int and 0 <= side <= LARGEST_SIDE for side in shape)
            if sound and end - begin == math.prod(shape) * DTYPES[dtype].itemsize:
                return begin, end
            sides, first, last = (short(str(value)) for value in (shape[: MOST_DIMS + 1], begin, end))
            raise UnsupportedCheckpoint(f"{short(key)} is {dtype} of shape {sides}, but has bytes {first} to {last}")
    key = short(key)
    raise UnsupportedCheckpoint(f"not a safetensors file: the entry of {key} lacks dtype, shape or data_offsets")


def _read_safetensors(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    header = _safetensors_header(path)
    with path.open("rb") as file:
        for key in keys:
            if key not in header.tensors:
                raise UnsupportedCheckpoint(f"{key} is not in the file any more")
            info = header.tensors[key]
            data = bytearray(math.prod(info.shape) * info.dtype.itemsize)
            file.seek(info.offset)
            if (got := file.readinto(data)) < len(data):
                raise UnsupportedCheckpoint(f"truncated: {key} has {len(data)} bytes, the file gave {got}")
            flat = torch.frombuffer(data, dtype=info.dtype) if data else torch.empty(0, dtype=info.dtype)
            yield key, flat.reshape(info.shape)


def _read_archive(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    with path.open("rb") as file:
        archive = read_archive(file)
        tensors, others = _unwrap(archive)
        for key in keys:
            if key in others:
                raise UnsupportedCheckpoint(f"{short(key)} is {others[key]}; a dense tensor was expected")
            if key not in tensors:
                raise UnsupportedCheckpoint(f"{short(key)} is not in the file any more")
            yield key, read_tensor(file, archive, key, tensors[key])


def _unwrap(archive: Archive) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors of a pickled dict, of its `state_dict`, or of the one dict that is all it holds; the other keys."""
    content = archive.content
    for _ in range(MOST_LEVELS):
        if not isinstance(content, dict):
            break
        inner = content.get("state_dict", next(iter(content.values())) if len(content) == 1 else None)
        if isinstance(inner, dict):
            content = inner
            continue
        tensors = {key: value for key, value in content.items() if isinstance(value, TensorRef)}
        others = {key: kind(value) for key, value in content.items() if key not in tensors}
        if not tensors:
            break
        for key, ref in tensors.items():
            check_there(archive, key, ref)
        return tensors, others
    held = kind(content)
    if isinstance(content, dict) and content:
        held += f" with {', '.join(f'{short(key)} ({kind(value)})' for key, value in [*content.items()][:3])}"
    raise UnsupportedCheckpoint(f"holds no tensors by name: {held} where a state dict was expected")


def dtype_name(dtype: torch.dtype) -> str:
    """`fp16`, `bf16`, `fp32`, `fp64`; torch's own name for the others."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))
