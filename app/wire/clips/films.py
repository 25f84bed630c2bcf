"""Clips on their way out, written as their frames come: a .npy, a zip or a multipart of PNG, an APNG, an animated WebP.

What is cut off looks cut off in each: a .npy and an APNG have said their length, a zip has no directory, a multipart
no last boundary; of a WebP, which begins with its length, nothing is there before all is. Video files are `video`'s.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from app.wire.images import write_webp
from app.wire.png import END, chunk, deflated, head, write_png

Frames = npt.NDArray[Any]
"""(t, H, W, 3 or 4)."""

BOUNDARY = "frame-of-latentd"
"""Between the parts of a multipart: a text that no PNG file has in it."""


@dataclass(frozen=True)
class FilmSpec:
    """What a film is to be."""

    count: int  # frames
    fps: int
    lossless: bool = False


class Film(Protocol):
    """A file of a clip while it is being written."""

    def add(self, frames: Frames) -> bytes:
        """The file's next bytes: all that these frames are."""

    def end(self) -> bytes:
        """Its last bytes, once all frames are there."""


class NpyFilm:
    """One array (T, H, W, C)."""

    def __init__(self, spec: FilmSpec) -> None:
        self._count = spec.count
        self._begun = False

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`."""
        data = np.ascontiguousarray(frames, frames.dtype.newbyteorder("<"))
        if self._begun:
            return data.tobytes()
        self._begun = True
        file = io.BytesIO()
        header = np.lib.format.header_data_from_array_1_0(data) | {"shape": (self._count, *data.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue() + data.tobytes()

    def end(self) -> bytes:
        """See `Film.end`."""
        return b""


class ZipFilm:
    """PNG files 0000.png, 0001.png, .., stored."""

    def __init__(self, spec: FilmSpec) -> None:
        self._digits = max(4, len(str(spec.count - 1)))
        self._number = 0
        self._tail = _Tail()
        self._archive = zipfile.ZipFile(self._tail, "w", zipfile.ZIP_STORED)

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`."""
        for frame in frames:
            entry = zipfile.ZipInfo(f"{self._number:0{self._digits}}.png")  # dated 1980
            entry.external_attr = 0o644 << 16  # without it, unzip makes files that nobody may read
            self._archive.writestr(entry, write_png(frame))
            self._number += 1
        return self._tail.taken()

    def end(self) -> bytes:
        """See `Film.end`."""
        self._archive.close()
        return self._tail.taken()


class MultipartFilm:
    """multipart/mixed of PNG files, each whole as soon as its frame is done."""

    def __init__(self, spec: FilmSpec) -> None:
        pass

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`."""
        return b"".join(_part(write_png(frame)) for frame in frames)

    def end(self) -> bytes:
        """See `Film.end`."""
        return f"--{BOUNDARY}--\r\n".encode()


class ApngFilm:
    """A PNG file that moves, over and over. Format: W3C, "Portable Network Graphics", third edition, 11.3.6."""

    def __init__(self, spec: FilmSpec) -> None:
        self._count = spec.count
        self._fps = spec.fps
        self._number = 0
        self._sequence = 0

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`."""
        parts = []
        for frame in frames:
            if not self._number:
                parts += [head(frame), chunk(b"acTL", struct.pack(">II", self._count, 0))]
            height, width, _ = frame.shape
            # at 0, 0; shown for 1 / fps s; left there for the next frame, which replaces it
            control = struct.pack(">IIIIHHBB", width, height, 0, 0, 1, self._fps, 0, 0)
            parts.append(chunk(b"fcTL", self._next(), control))
            data = deflated(frame)
            parts.append(chunk(b"fdAT", self._next(), data) if self._number else chunk(b"IDAT", data))
            self._number += 1
        return b"".join(parts)

    def end(self) -> bytes:
        """See `Film.end`."""
        return END

    def _next(self) -> bytes:
        self._sequence += 1
        return struct.pack(">I", self._sequence - 1)


class WebpFilm:
    """A WebP file that moves, over and over. Format: RFC 9649, 2.7.1."""

    def __init__(self, spec: FilmSpec) -> None:
        self._spec = spec
        self._parts: list[bytes] = []
        self._canvas = b""

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`: nothing yet, for the file begins with its length."""
        for frame in frames:
            height, width, channels = frame.shape
            sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            self._canvas = bytes((2 | (channels == 4) << 4, 0, 0, 0)) + sides  # it moves; it may have alpha
            number = len(self._parts)
            begins, ends = (round(1000 * index / self._spec.fps) for index in (number, number + 1))
            # at 0, 0; instead of what was there before
            control = bytes(6) + sides + (ends - begins).to_bytes(3, "little") + b"\2"
            self._parts.append(_riff(b"ANMF", control, *_webp_parts(write_webp(frame, self._spec.lossless))))
        return b""

    def end(self) -> bytes:
        """See `Film.end`."""
        head = _riff(b"VP8X", self._canvas), _riff(b"ANIM", bytes(6))  # over and over
        return _riff(b"RIFF", b"WEBP", *head, *self._parts)


FILMS: dict[str, Callable[[FilmSpec], Film]] = {
    "application/zip": ZipFilm,
    "application/x-npy": NpyFilm,
    "image/apng": ApngFilm,
    "multipart/mixed": MultipartFilm,
    "image/webp": WebpFilm,
}
"""By media type."""


class _Tail(io.BytesIO):
    """A file of which only the bytes that nobody has taken yet are there. A zip's writer goes back no further."""

    def __init__(self) -> None:
        super().__init__()
        self._gone = 0

    def taken(self) -> bytes:
        """What was written since the last time."""
        found = self.getvalue()
        self._gone += len(found)
        super().seek(0)
        self.truncate()
        return found

    def tell(self) -> int:
        """In the whole file."""
        return self._gone + super().tell()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """To a place in the whole file."""
        return self._gone + super().seek(offset - self._gone if whence == 0 else offset, whence)


def _riff(name: bytes, *data: bytes) -> bytes:
    size = sum(map(len, data))
    return b"".join((name, size.to_bytes(4, "little"), *data, bytes(size % 2)))


def _webp_parts(picture: bytes) -> Iterator[bytes]:
    """The chunks of a WebP file that are its pixels and their alpha."""
    at = 12
    while at < len(picture):
        size = int.from_bytes(picture[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if picture[at : at + 4] in (b"VP8 ", b"VP8L", b"ALPH"):
            yield picture[at:end]
        at = end


def _part(picture: bytes) -> bytes:
    begin = f"--{BOUNDARY}\r\nContent-Type: image/png\r\nContent-Length: {len(picture)}\r\n\r\n"
    return begin.encode() + picture + b"\r\n"
