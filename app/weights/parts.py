"""Tensors that a publisher keeps as one and our network as several: the one is read as its parts, and written whole.

A part is a run of rows, as of the one matrix that makes queries, keys and values.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from io import BufferedReader

from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.vae.architectures import Architecture
from app.weights.files import Make, Span, TensorInfo, WeightFile


def parted(file: WeightFile, architecture: Architecture) -> WeightFile:
    """The file as if it had the parts.

    Raises UnsupportedCheckpoint where a tensor has no equal parts.
    """
    if architecture.parts is None:
        return file
    whole, ends = architecture.parts
    tensors: dict[str, TensorInfo] = {}
    origins: dict[str, tuple[str, int]] = {}  # of a part: the key that the file has, and which part it is
    for key, info in file.tensors.items():
        if not key.endswith(whole):
            tensors[key] = info
            continue
        if not info.shape or info.shape[0] % len(ends):
            raise UnsupportedCheckpoint(f"{key} has shape {info.shape}; {len(ends)} equal parts were expected")
        for i, end in enumerate(ends):
            part = key.removesuffix(whole) + end
            tensors[part] = TensorInfo(info.dtype, (info.shape[0] // len(ends), *info.shape[1:]))
            origins[part] = (key, i)

    def find(opened: BufferedReader, key: str) -> tuple[Span, Make]:
        if key not in origins:
            return file._find(opened, key)
        origin, i = origins[key]
        span, make = file._find(opened, origin)
        return span, partial(_part, make=make, count=len(ends), i=i)

    return replace(file, tensors=tensors, _find=find)


def whole_of(names: Iterable[str], architecture: Architecture) -> dict[str, list[str]]:
    """{key in the publisher's layout: the canonical names that it consists of, first rows first}."""
    names = list(names)
    if architecture.parts is None:
        return {name: [name] for name in names}
    whole, ends = architecture.parts
    found: dict[str, list[str]] = {}
    for name in names:
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            found[name] = [name]
        elif end == ends[0]:
            stem = name.removesuffix(end)
            found[stem + whole] = [stem + each for each in ends]
    return found


def _part(data: bytearray, make: Make, count: int, i: int) -> Tensor:
    return make(data).chunk(count)[i].clone()
