"""Clips on their way out, written as their frames come: a .npy, a zip or a multipart of PNG, an APNG.

What is cut off looks cut off in each: a .npy and an APNG have said their length, a zip has no directory, a multipart
no last boundary.
"""

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from app.wire.png import END, chunk, deflated, head, write_png

Frames = npt.NDArray[Any]
"""(t, H, W, 3 or 4)."""

BOUNDARY = "frame-of-latentd"
"""Between the parts of a multipart: a text that no PNG file has in it."""


class Film(Protocol):
    """A file of a clip while it is being written."""

    def add(self, frames: Frames) -> bytes:
        """The file's next bytes: all that these frames are."""

    def end(self) -> bytes:
        """Its last bytes, once all frames are there."""


class NpyFilm:
    """One array (T, H, W, C)."""

    def __init__(self, count: int, fps: int) -> None:
        self._count = count
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

    def __init__(self, count: int, fps: int) -> None:
        self._digits = max(4, len(str(count - 1)))
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

    def __init__(self, count: int, fps: int) -> None:
        pass

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`."""
        return b"".join(_part(write_png(frame)) for frame in frames)

    def end(self) -> bytes:
        """See `Film.end`."""
        return f"--{BOUNDARY}--\r\n".encode()


class ApngFilm:
    """A PNG file that moves, over and over. Format: W3C, "Portable Network Graphics", third edition, 11.3.6."""

    def __init__(self, count: int, fps: int) -> None:
        self._count = count
        self._fps = fps
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


FILMS: dict[str, Callable[[int, int], Film]] = {
    "application/zip": ZipFilm,
    "application/x-npy": NpyFilm,
    "image/apng": ApngFilm,
    "multipart/mixed": MultipartFilm,
}
"""By media type; each is made of the number of frames and of frames per second."""


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


def _part(picture: bytes) -> bytes:
    begin = f"--{BOUNDARY}\r\nContent-Type: image/png\r\nContent-Length: {len(picture)}\r\n\r\n"
    return begin.encode() + picture + b"\r\n"
