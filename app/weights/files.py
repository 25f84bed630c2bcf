"""The file formats of weights: what is in a file without reading its tensors, and the tensors one by one.

Files are read with plain reads: no mapping, so a file truncated under our feet is an error and never a SIGBUS. What
torch.save writes is the business of `archives` and `pickles`, which run no code of the file.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.text import short
from app.weights.archives import read_archive, span_of, state_dict
from app.weights.header import PREFIX
from app.weights.rebuilds import DTYPES, TensorRef
from app.weights.safetensors import read_safetensors

Format = Literal["safetensors", "ckpt", "pt", "pth", "bin", "diffusers"]

SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".ckpt": "ckpt",
    ".pt": "pt",
    ".pth": "pth",
    ".bin": "bin",
}

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name.removeprefix("torch.")) for name in DTYPES}
)

FOREIGN = (
    # how files of other programs begin, and what they are
    (rb"version https://git-lfs", "a Git LFS pointer, of which `git lfs pull` makes the file"),
    (rb"\s*<(!doctype html|html|head)\b", "an HTML page: saved in place of the file that it tells of"),
    (rb"\s*<\?xml", "an XML document, as servers answer in place of a file"),
    (rb"GGUF", "a GGUF file; .safetensors or what torch.save wrote was expected"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", "a picture"),
    (rb"7z\xbc\xaf|Rar!|\x1f\x8b|\x28\xb5\x2f\xfd", "a compressed archive: unpack it first"),
    (rb"\x89HDF\r", "an HDF5 file, as Keras writes"),
)
LONGEST_BEGIN = 64  # bytes of a file that are looked at for them

CHUNK = 1 << 20  # bytes that are read at once where no tensor is wanted

Span = tuple[int, int]  # (first, after the last) byte of a file
Make = Callable[[bytearray], Tensor]  # a tensor out of the bytes of its span, whose memory it may keep
Find = Callable[[BufferedReader, str], tuple[Span, Make]]
State = tuple[int, int, int, int]  # of a file: device, inode, size, time of its last change


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, unread."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFile:
    """What a file holds, its header read and no tensor; nothing stays open."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    """The text metadata of a safetensors file."""
    others: Mapping[str, str]
    """What a pickle has under its other keys, as `a sparse tensor`: what cannot be read is no fault until needed."""
    _find: Find = field(repr=False)
    _state: State = field(repr=False)

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor on the host) one at a time, each in memory of its own; no other key's bytes are read.

        Raises UnsupportedCheckpoint when a key is not there, is no dense tensor, or the file cannot be read or is
        another by now.
        """
        with self._reading() as file:
            for key in keys:
                (begin, after), make = self._find(file, key)
                file.seek(begin)
                yield key, make(_take(file, after - begin, key))

    def read_all(self, keys: Iterable[str], take: Callable[[bytearray], object]) -> Iterator[tuple[str, Tensor]]:
        """The same in the order of the file, every byte of which passes `take` once, from the first to the last.

        Tensors that share bytes come last, and theirs are read once more. Raises as `read`.
        """
        with self._reading() as file:
            found = sorted(((*self._find(file, key), key) for key in keys), key=itemgetter(0))
            end, shared = 0, []
            file.seek(0)
            for (begin, after), make, key in found:
                if begin < end or begin == after:
                    shared.append(key)
                    continue
                while end < begin:
                    take(_take(file, min(CHUNK, begin - end), "what lies between the tensors"))
                    end = min(end + CHUNK, begin)
                data = _take(file, after - begin, key)
                take(data)
                end = after
                yield key, make(data)
            while data := bytearray(file.read(CHUNK)):
                take(data)
        yield from self.read(shared)

    @contextmanager
    def _reading(self) -> Iterator[BufferedReader]:
        with _open(self.path) as file:
            if _state_of(file) != self._state:
                raise UnsupportedCheckpoint(f"{self.path.name} was written to or replaced while it was read")
            yield file


def open_weights(path: Path) -> WeightFile:
    """Reads the header of a file: its keys, dtypes and shapes, and where its tensors are.

    Raises UnsupportedCheckpoint with a one-line reason for whatever cannot be read.
    """
    with _open(path) as file:
        state = _state_of(file)
        begin = file.read(LONGEST_BEGIN)
        if what := next((what for pattern, what in FOREIGN if re.match(pattern, begin, re.I | re.S)), None):
            raise UnsupportedCheckpoint(f"this is {what}")
        tells = begin[: PREFIX + 1]  # some programs give safetensors a pickle's suffix
        if SUFFIXES.get(path.suffix.lower()) == "safetensors" or tells[PREFIX:] == b"{":
            return _open_safetensors(path, file, state)
        return _open_archive(path, file, state)


def open_regular(path: Path) -> BufferedReader:
    """A file for reading. Raises OSError, also for a pipe or a device, which is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def suffix_for(path: Path) -> str:
    """The suffix that a file's content asks for: a pickle's where it is no safetensors. Raises OSError."""
    with open_regular(path) as file:
        return ".safetensors" if file.read(PREFIX + 1)[PREFIX:] == b"{" else ".ckpt"


def format_of(path: Path) -> Format:
    """The form that a file's suffix says; `bin` for those that say none."""
    return SUFFIXES.get(path.suffix.lower(), "bin")


def dtype_name(dtype: torch.dtype) -> str:
    """`fp16`, `bf16`, `fp32`, `fp64`; torch's own name for the others."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise UnsupportedCheckpoint(f"cannot be read: {error.strerror or error}") from error


def _state_of(file: BufferedReader) -> State:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _take(file: BufferedReader, count: int, what: str) -> bytearray:
    """The next bytes of a file, all of them."""
    data = bytearray(count)
    if (got := file.readinto(data)) < count:
        raise UnsupportedCheckpoint(f"truncated: {short(what)} has {count} bytes, the file gave {got}")
    return data


def _open_safetensors(path: Path, file: BufferedReader, state: State) -> WeightFile:
    stored, metadata = read_safetensors(file, state[2])

    def find(_: BufferedReader, key: str) -> tuple[Span, Make]:
        if key not in stored:
            raise UnsupportedCheckpoint(f"{short(key)} is not in the file")
        return stored[key].span, stored[key].tensor

    tensors = {key: TensorInfo(item.dtype, item.shape) for key, item in stored.items()}
    return WeightFile(path, tensors, metadata, {}, find, state)


def _open_archive(path: Path, file: BufferedReader, state: State) -> WeightFile:
    archive = read_archive(file)
    refs, others = state_dict(archive)

    def find(file: BufferedReader, key: str) -> tuple[Span, Make]:
        if key in others:
            raise UnsupportedCheckpoint(f"{short(key)} is {others[key]}; a dense tensor was expected")
        if key not in refs:
            raise UnsupportedCheckpoint(f"{short(key)} is not in the file")
        return span_of(file, archive, key, refs[key]), partial(_dense, ref=refs[key])

    tensors = {key: TensorInfo(TORCH_DTYPES[ref.dtype], ref.shape) for key, ref in refs.items()}
    return WeightFile(path, tensors, {}, others, find, state)


def _dense(data: bytearray, ref: TensorRef) -> Tensor:
    """The tensor whose span these bytes are; its memory may be theirs."""
    dtype = TORCH_DTYPES[ref.dtype]
    if not data:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).as_strided(ref.shape, ref.stride).contiguous()
