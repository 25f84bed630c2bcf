"""Clips on their way in, read once and from the first frame on, whatever they come as."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from app.errors import InvalidImage, TooLarge, UnsupportedMedia
from app.wire.arrays.npz import file_of, pictures_of
from app.wire.arrays.spec import ArraySpec
from app.wire.headers import WORK, PictureHeader, read_header
from app.wire.images import Colour, read_frames, read_image
from app.wire.pixels import PixelsHeader, array_header, pixels_header, read_pixels
from app.wire.scan import Body
from app.wire.sniff import PICTURES, sniff, sniffed

LONGEST_HEADER = 1 << 18
"""Bytes of a frame's file beside its pixels, which have at most 16 each: a profile, texts."""

VIDEOS = ("a file of MP4's kind", "Matroska or WebM")


class Reel(Protocol):
    """A clip's frames."""

    size: tuple[int, int]  # (width, height) in pixels of each
    count: int  # frames; that many are there or `read` raises
    alpha: bool  # of an array of four channels

    @property
    def work(self) -> int:
        """Bytes of memory that reading a frame takes at most."""

    def read(self, count: int, background: Colour | None) -> list[npt.NDArray[Any]]:
        """The next frames, (H, W, 3), uint8 or float32 as of `read_pixels`; without a background (H, W, 4)."""

    def close(self) -> None:
        """Lets go of decoders."""


def reel_of(body: Body, *, max_pixels: int) -> Reel:
    """The clip of a body: an array, a picture that moves, a zip of PNG, or with the extra latentd[video] a video file.

    Raises UnsupportedMedia for what is none of these, and as their own readers do.
    """
    kind = sniff(body, (*PICTURES, "npy", "safetensors", "npz", *VIDEOS))
    if kind in VIDEOS:
        return _video(body, kind, max_pixels)
    if kind == "npz":
        return ZipReel(body, max_pixels)
    header = pixels_header(body)
    return ArrayReel(body, header) if isinstance(header.declared, ArraySpec) else MovingReel(body, header, max_pixels)


def is_video(body: Body) -> bool:
    """Whether a body is a video file, by its first bytes."""
    return sniffed(body) in VIDEOS


def _video(body: Body, kind: str, max_pixels: int) -> Reel:
    try:
        from app.wire.clips.video import VideoReel
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise UnsupportedMedia(f"{kind} is read with the extra latentd[video], which is not installed here") from None
    return VideoReel(body, kind, max_pixels)


class ArrayReel:
    """Pictures (T, H, W, 3), or in floats (T, 3, H, W)."""

    def __init__(self, body: Body, header: PixelsHeader) -> None:
        spec = header.declared
        if not isinstance(spec, ArraySpec) or spec.fortran:
            raise InvalidImage("expected the frames of a clip in C order")
        self.size, self.count, self.alpha = header.size, header.count, header.alpha
        self._body, self._spec, self._read = body, spec, 0

    @property
    def work(self) -> int:
        """See `Reel.work`."""
        return array_header(self._spec).work // self.count

    def read(self, count: int, background: Colour | None) -> list[npt.NDArray[Any]]:
        """See `Reel.read`."""
        each = self._spec.nbytes // self.count
        start = self._spec.start + self._read * each
        part = replace(self._spec, shape=(count, *self._spec.shape[1:]), start=start)
        self._read += count
        most = self.size[0] * self.size[1]
        return read_pixels(self._body, PixelsHeader(part), background=background, max_pixels=most)

    def close(self) -> None:
        """See `Reel.close`."""


class MovingReel:
    """An APNG or an animated WebP; any other picture is a clip of one frame."""

    alpha = False

    def __init__(self, body: Body, header: PixelsHeader, max_pixels: int) -> None:
        assert isinstance(header.declared, PictureHeader)
        self.size = header.size
        self.count = header.frames if header.declared.format in ("PNG", "WebP") else 1
        self._body, self._header, self._most = body, header.declared, max_pixels
        self._frames: Iterator[npt.NDArray[np.uint8]] | None = None

    @property
    def work(self) -> int:
        """See `Reel.work`."""
        return self._header.work

    def read(self, count: int, background: Colour | None) -> list[npt.NDArray[Any]]:
        """See `Reel.read`."""
        if self._frames is None:
            self._frames = read_frames(self._body, self._header, background=background, max_pixels=self._most)
        return list(islice(self._frames, count))

    def close(self) -> None:
        """See `Reel.close`."""
        self._frames = None


class ZipReel:
    """PNG files in the order of their names, all of one size."""

    alpha = False

    def __init__(self, body: Body, max_pixels: int) -> None:
        self._body, self._most = body, max_pixels
        self._members = pictures_of(body)
        self.count = len(self._members)
        # As much as is enough for a header, and no more than a picture may have anyway.
        first = read_header(file_of(body, self._members[0], 16 * max_pixels, LONGEST_HEADER))
        if first.width * first.height > max_pixels:
            raise TooLarge(f"the frames have {first.width}x{first.height} pixels, more than the limit of {max_pixels}")
        self.size = first.shown
        self._longest = 16 * first.width * first.height + LONGEST_HEADER
        self.work = self._longest + first.width * first.height * WORK
        self._read = 0

    def read(self, count: int, background: Colour | None) -> list[npt.NDArray[Any]]:
        """See `Reel.read`."""
        found = []
        for member in self._members[self._read : self._read + count]:
            content = file_of(self._body, member, self._longest)
            header = read_header(content)
            if header.shown != self.size:
                name = member.filename[:40]
                raise InvalidImage(f"frames of one size were expected: {name!r} has {header.shown}, not {self.size}")
            found.append(read_image(content, header, background=background, max_pixels=self._most))
        self._read += count
        return found

    def close(self) -> None:
        """See `Reel.close`."""
