"""Writes weights: a safetensors file tensor by tensor, the same bytes every time, and nothing half-written.

The library's own writer wants all tensors at once and orders the metadata by chance, so that two files of the same
tensors differ.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from app.errors import InvalidParameter
from app.weights.header import Entry, Header, format_header
from app.weights.safetensors import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}

Write = Callable[[BinaryIO], object]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is still to come."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Wide dtypes first, so that every tensor is aligned to its own width; then by key."""
    return sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.key))


def safetensors_writer(
    specs: Iterable[TensorSpec], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> Write:
    """A function that writes the header, then the tensors as they come; they must come as the specs say."""
    specs = list(specs)
    entries: dict[str, Entry] = {}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        entries[spec.key] = Entry(CODES[spec.dtype], spec.shape, begin, end)
    header = format_header(Header(entries, metadata or {}))

    def write(file: BinaryIO) -> None:
        file.write(header)
        for spec, tensor in zip(specs, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise ValueError(f"{spec.key}: {spec.dtype} {spec.shape} was announced, {tensor.dtype} came")
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write


def publish(files: Mapping[Path, Write], *, force: bool = False, check: Callable[[], None] | None = None) -> None:
    """Writes all files beside their places under hidden names, and moves them there once all are on the disk.

    `check` runs between the two and may still raise. Whatever is raised, no file has appeared or changed unless the
    moves had begun. Raises InvalidParameter when a place is taken and `force` is not given, and OSError.
    """
    _check_free(files, force)
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, write in files.items():
            _write(parts[path], path, write)
        if check is not None:
            check()
        _check_free(files, force)
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            with suppress(OSError):  # moved, never made, or on a disk that is gone
                part.unlink()


def _write(part: Path, path: Path, write: Write) -> None:
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file by itself


def _check_free(files: Iterable[Path], force: bool) -> None:
    for path in files:
        if path.is_dir():
            raise InvalidParameter(f"{path} is a folder; a file was to be written there")
        if not force and (path.exists() or path.is_symlink()):
            raise InvalidParameter(f"{path} exists; --force replaces it")
