"""The open bitstream units of AV1: what a still picture's bitstream says of itself before a decoder gets it.

The decoder believes the bitstream and not the file around it: the sequence header has the most that a frame may
measure, and a frame header could state any size but for the flag that is looked at here. Names and order of the fields
are those of the AV1 specification, 5.3 to 5.9.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from app.errors import InvalidImage, MalformedBody
from app.wire.scan import Body

MAX_UNITS = 1024
"""Of one picture: a frame of the most tiles has 4096 of them in at most as many groups; encoders write one or a few."""

_SEQUENCE = 1
_FRAMES = {3, 6, 7}  # a header alone, a header with tiles, and a redundant one, which may come first
_SELECT = 2  # of the tools for screen content: each frame says for itself
_KEY = 0
_HEADER = 512  # bytes of a header that are looked at: all fields together are shorter


@dataclass(frozen=True)
class Sequence:
    """What a sequence header says."""

    width: int
    height: int
    """Pixels that a frame has at most, and has where its own header says nothing else."""
    colour: tuple[int, int]
    """Primaries and transfer as ITU-T H.273 numbers them; 2 where nothing is said."""
    reduced: bool
    """Of a still picture alone: its frame's header says neither a type nor a size."""
    screen_tools: int
    integer_mv: int
    time_bits: int
    """Of a shown frame's header, when it is to be shown."""
    id_bits: int


class Bits:
    """Reads a header bit by bit."""

    def __init__(self, data: Body) -> None:
        self._value = int.from_bytes(data[:_HEADER])
        self._left = 8 * min(len(data), _HEADER)

    def f(self, count: int = 1) -> int:
        """The next so many bits. Raises MalformedBody at the end."""
        self._left -= count
        if self._left < 0:
            raise MalformedBody("the AVIF file is truncated or corrupt: an AV1 header ends too early")
        return self._value >> self._left & (1 << count) - 1

    def uvlc(self) -> int:
        """A number of as many bits as zeros stand before it."""
        zeros = 0
        while not self.f():
            zeros += 1
        if zeros >= 32:  # decoders read no further then, and go on elsewhere than we would
            raise MalformedBody("the AVIF file is truncated or corrupt: a number in an AV1 header is too long")
        return self.f(zeros) + (1 << zeros) - 1


def read_still(data: Body) -> Sequence:
    """The one sequence header of a bitstream of one shown key frame.

    Raises MalformedBody where there is none or several differ, and InvalidImage for more frames, or a size of its own.
    """
    sequence: bytes | None = None
    frames: list[bytes] = []
    for kind, payload in _units(memoryview(data)):
        if kind == _SEQUENCE:
            if sequence not in (None, payload):
                raise MalformedBody("the AVIF file states two different sizes: it has several AV1 sequence headers")
            sequence = payload
        elif kind in _FRAMES:
            frames.append(payload)
    if sequence is None:
        raise MalformedBody("the AVIF file has no width and height in its header: no AV1 sequence header is there")
    if len(frames) > 1:
        raise InvalidImage(f"the picture of the AVIF file has {len(frames)} frames or layers; one is read")
    read = read_sequence(sequence)
    if frames and not read.reduced:
        _check_frame(frames[0], read)
    return read


def _units(data: memoryview) -> Iterator[tuple[int, bytes]]:
    """The kind of each unit, and the beginning of what it holds."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > MAX_UNITS:
            raise MalformedBody(f"the picture of the AVIF file is cut into more than {MAX_UNITS} parts")
        head = data[at]
        if head & 0x80:
            raise MalformedBody("the AVIF file is truncated or corrupt: it holds no AV1")
        at += 2 if head & 4 else 1
        size = len(data) - at
        if head & 2:
            size = 0
            for index, byte in enumerate(islice(data[at:], 8)):  # leb128
                size |= (byte & 0x7F) << 7 * index
                at += 1
                if byte < 0x80:
                    break
        yield head >> 3 & 15, bytes(data[at : at + min(size, _HEADER)])
        at += size


def read_sequence(payload: bytes) -> Sequence:
    """The fields of a sequence header up to its colours. Raises MalformedBody."""
    bits = Bits(payload)
    profile, _, reduced = bits.f(3), bits.f(), bits.f()
    time_bits = _operating_points(bits) if not reduced else bits.f(5) * 0
    width_bits, height_bits = bits.f(4) + 1, bits.f(4) + 1
    width, height = bits.f(width_bits) + 1, bits.f(height_bits) + 1
    id_bits = bits.f(4) + bits.f(3) + 3 if not reduced and bits.f() else 0
    bits.f(3)  # superblocks, filters of intra prediction
    screen_tools = integer_mv = _SELECT
    if not reduced:
        bits.f(4)  # compounds, warped motion, filters
        if order_hint := bits.f():
            bits.f(2)
        screen_tools = _SELECT if bits.f() else bits.f()
        if screen_tools:
            integer_mv = _SELECT if bits.f() else bits.f()
        if order_hint:
            bits.f(3)
    bits.f(3)  # super-resolution, CDEF, restoration
    if bits.f() and profile == 2:
        bits.f()
    if profile != 1:
        bits.f()
    colour = (bits.f(8), bits.f(8)) if bits.f() else (2, 2)
    return Sequence(width, height, colour, bool(reduced), screen_tools, integer_mv, time_bits, id_bits)


def _operating_points(bits: Bits) -> int:
    """Passes over times and layers; the bits of a frame's time."""
    delay_bits = time_bits = 0
    model = False
    if bits.f():
        bits.f(64)
        if equal := bits.f():
            bits.uvlc()
        if model := bool(bits.f()):
            delay_bits = bits.f(5) + 1
            bits.f(32 + 5)
            time_bits = bits.f(5) + 1
        time_bits = 0 if equal else time_bits
    delayed = bits.f()
    for _ in range(bits.f(5) + 1):
        bits.f(12)
        if bits.f(5) > 7:
            bits.f()
        if model and bits.f():
            bits.f(2 * delay_bits + 1)
        if delayed and bits.f():
            bits.f(4)
    return time_bits


def _check_frame(payload: bytes, sequence: Sequence) -> None:
    """Raises InvalidImage for a frame that is no shown key frame of its sequence's size."""
    bits = Bits(payload)
    if bits.f() or bits.f(2) != _KEY or not bits.f():
        raise InvalidImage("the picture of the AVIF file is no key frame that is shown")
    bits.f(sequence.time_bits)
    bits.f()  # whether its statistics are kept
    tools = bits.f() if sequence.screen_tools == _SELECT else sequence.screen_tools
    if tools and sequence.integer_mv == _SELECT:
        bits.f()
    bits.f(sequence.id_bits)
    if bits.f():
        raise InvalidImage("the picture of the AVIF file states a size beside that of its sequence")
