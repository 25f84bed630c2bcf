"""Video files <-> frames, by PyAV (FFmpeg): mp4, webm and Matroska, written as frames come and read one by one.

Of the extra latentd[video]: whoever needs this module imports it then. Frames are sRGB; what has luminance and
chrominance is of ITU-R BT.709 in limited range, and says so. Of a file that says nothing, HD is BT.709 and what is
smaller BT.601, as players have it.
"""

import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from app.errors import InvalidImage, MalformedBody, NotAcceptable, TooLarge
from app.wire.clips.films import FilmSpec, Frames
from app.wire.clips.tables import MAX_SAMPLES, check_tables
from app.wire.images import WHITE, Colour, flattened, opaque
from app.wire.scan import Body

BT709, RGB = 1, 0  # H.273: primaries, transfer and matrix; the matrix that is none
LIMITED, FULL = 1, 2  # AVColorRange
HD = 720  # lines, from which a file that says nothing is of BT.709
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

READ = {"a file of MP4's kind": "mov", "Matroska or WebM": "matroska"}
"""FFmpeg's name of each format that is read: of no other one the parser is reached."""
CODECS = "h264,hevc,vp8,vp9,libvpx-vp9,av1,libdav1d,ffv1,mpeg4,mjpeg,prores"
"""Decoders that a file may ask for."""

BLOCK = 128
"""Rows and columns that a codec may have beyond a film's sides: AV1's largest block."""

WORK = 16
"""Bytes for each pixel of a frame that is read: the decoder's own, three of which it refers to, and the result."""


@dataclass(frozen=True)
class Codec:
    """How a clip becomes one kind of file."""

    container: str
    encoder: str
    pixels: str  # FFmpeg's name of the pixel format
    options: dict[str, str]
    muxing: dict[str, str]

    @property
    def halves(self) -> bool:
        """Whether chrominance has half of the sides, which are even therefore."""
        return self.pixels == "yuv420p"


_FRAGMENTS = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
_CLUSTERS = {"live": "1", "cluster_time_limit": "1"}
_NO_DELAY = {"preset": "veryfast", "tune": "zerolatency"}
_VP9 = {"deadline": "realtime", "cpu-used": "5", "lag-in-frames": "0", "b": "0"}

CODEC_OF = {
    ("video/mp4", False): Codec("mp4", "libx264", "yuv420p", {"crf": "18", **_NO_DELAY}, _FRAGMENTS),
    ("video/mp4", True): Codec("mp4", "libx264rgb", "rgb24", {"crf": "0", **_NO_DELAY}, _FRAGMENTS),
    ("video/webm", False): Codec("webm", "libvpx-vp9", "yuv420p", {"crf": "24", **_VP9}, _CLUSTERS),
    ("video/webm", True): Codec("webm", "libvpx-vp9", "gbrp", {"lossless": "1", **_VP9}, _CLUSTERS),
    ("video/x-matroska", False): Codec("matroska", "ffv1", "bgr0", {}, _CLUSTERS),
    ("video/x-matroska", True): Codec("matroska", "ffv1", "bgr0", {}, _CLUSTERS),
}
"""By media type, and whether it is to be without loss; Matroska is always."""


class VideoFilm:
    """A clip as a video file, without sound, each frame handed on as the next one comes. Alpha is laid over white."""

    def __init__(self, media: str, spec: FilmSpec) -> None:
        self._codec = CODEC_OF[media, spec.lossless]
        self._fps = spec.fps
        self._written = bytearray()
        self._file = av.open(_Sink(self._written), "w", format=self._codec.container, options=self._codec.muxing)
        self._stream: av.VideoStream | None = None
        self._number = 0

    def add(self, frames: Frames) -> bytes:
        """See `Film.add`."""
        for frame in frames:
            pixels = np.ascontiguousarray(flattened(frame, WHITE))
            stream = self._stream = self._stream or self._begin(pixels)
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if self._codec.pixels.startswith("yuv"):
                picture = picture.reformat(
                    format=self._codec.pixels,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=SCALING,
                )
            picture.pts = self._number
            self._number += 1
            self._file.mux(stream.encode(picture))
        return self._taken()

    def end(self) -> bytes:
        """See `Film.end`."""
        if self._stream is not None:
            self._file.mux(self._stream.encode(None))
        self._file.close()
        return self._taken()

    def _begin(self, frame: npt.NDArray[np.uint8]) -> av.VideoStream:
        stream = self._file.add_stream(self._codec.encoder, rate=self._fps, options=self._codec.options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frame.shape[:2]
        stream.pix_fmt = self._codec.pixels
        context = stream.codec_context
        context.thread_count = 1  # as many films as threads of codecs are written at once
        context.color_primaries = context.color_trc = BT709
        in_yuv = self._codec.pixels.startswith("yuv")
        context.colorspace, context.color_range = (BT709, LIMITED) if in_yuv else (RGB, FULL)
        return stream

    def _taken(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


def check_video(media: str, lossless: bool, size: tuple[int, int]) -> None:
    """Raises NotAcceptable for a (width, height) that such a file does not have."""
    if CODEC_OF[media, lossless].halves and (size[0] % 2 or size[1] % 2):
        raise NotAcceptable(
            f"{media} has even sides, the frames have {size[0]}x{size[1]}; lossless=true and video/x-matroska take any"
        )


class VideoReel:
    """The frames of a video file, read once and in order; times are not looked at, nor sound.

    Sizes and counts are what the file's own parts say, not its header's claims: raises UnsupportedMedia,
    MalformedBody, TooLarge above `max_pixels` before any is decoded, and InvalidImage for what is no upright film.
    """

    alpha = False

    def __init__(self, body: Body, kind: str, max_pixels: int) -> None:
        bounds = {"max_pixels": str(max_pixels), "threads": "1", "codec_whitelist": CODECS}
        # Edits are times, too; a list of them would make of every frame as many as it has entries.
        how = {"ignore_editlist": "1"} if READ[kind] == "mov" else {}
        if READ[kind] == "mov":
            check_tables(body)
        with _broken():
            self._file = av.open(io.BytesIO(body), "r", format=READ[kind], options=bounds | how)
        try:
            if not self._file.streams.video:
                raise InvalidImage("the file has no film in it")
            stream = self._stream = self._file.streams.video[0]
            context: av.VideoCodecContext | None = stream.codec_context
            if context is None:
                raise MalformedBody("the film is of no kind that is read")
            self.size = context.width, context.height
            if min(self.size) < 1:
                raise MalformedBody("the film says no size")
            if context.width * context.height > max_pixels:
                raise TooLarge(f"the film has {context.width}x{context.height} pixels, more than {max_pixels}")
            # Of what a decoder finds the sides are those that were said, up to the blocks that they are padded to.
            context.options = bounds | {"max_pixels": str((self.size[0] + BLOCK) * (self.size[1] + BLOCK))}
            context.thread_count = 1
            with _broken():
                packets = (packet for packet in self._file.demux(stream) if packet.size > 0)
                self.count = sum(1 for _ in islice(packets, MAX_SAMPLES + 1))
                if self.count > MAX_SAMPLES:
                    raise TooLarge(f"the film has more than {MAX_SAMPLES} frames")
                self._file.seek(0)
            self.fps = stream.average_rate or Fraction(0)
            self._frames = self._decoded()
        except BaseException:
            self._file.close()
            raise

    @property
    def work(self) -> int:
        """Bytes of memory that reading a frame takes at most."""
        return WORK * self.size[0] * self.size[1]

    def read(self, count: int, background: Colour | None) -> list[npt.NDArray[Any]]:
        """See `Reel.read`."""
        found = list(islice(self._frames, count))
        if len(found) < count:
            raise MalformedBody(f"the film ends early: {self.count} frames were expected")
        return found if background is not None else [opaque(frame, 4) for frame in found]

    def close(self) -> None:
        """See `Reel.close`."""
        self._frames.close()
        self._file.close()

    def _decoded(self) -> Generator[npt.NDArray[np.uint8]]:
        with _broken():
            for frame in self._file.decode(self._stream):
                if (frame.width, frame.height) != self.size:
                    raise InvalidImage(f"the film changes its size to {frame.width}x{frame.height}")
                if frame.rotation:
                    raise InvalidImage(f"the film is to be turned by {frame.rotation} degrees: it is read upright only")
                yield _rgb(frame)


def _rgb(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    matrix = frame.colorspace
    if matrix not in (RGB, *map(int, (Colorspace.ITU709, Colorspace.ITU601, Colorspace.SMPTE240M))):
        matrix = int(Colorspace.ITU709 if frame.height >= HD else Colorspace.ITU601)
    source = {} if matrix == RGB else {"src_colorspace": matrix}
    picture = frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=SCALING, **source)
    return picture.to_ndarray().astype(np.uint8, copy=False)


@dataclass(frozen=True)
class _Sink:
    """A file that is written from its beginning to its end."""

    written: bytearray

    def write(self, data: bytes) -> int:
        self.written.extend(data)
        return len(data)


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (av.error.FFmpegError, av.error.EOFError) as error:
        raise MalformedBody(
            f"the film is truncated, corrupt or of a kind that is not read: {error.strerror}"
        ) from error
