"""Bitstreams of AV1 as tests want them: headers of which every field is said, and no pixels."""

SEQUENCE, FRAME = 1, 6


class Written:
    """Bits, one field after the other."""

    def __init__(self) -> None:
        self.bits = ""

    def f(self, count: int, value: int = 0) -> "Written":
        self.bits += f"{value:0{count}b}" if count else ""
        return self

    def bytes(self) -> bytes:
        padded = self.bits + "1"
        padded += "0" * (-len(padded) % 8)
        return int(padded, 2).to_bytes(len(padded) // 8)


def unit(kind: int, payload: bytes, *, sized: bool = True, layer: bool = False) -> bytes:
    """An OBU; `layer` gives it the byte that numbers its layer."""
    assert len(payload) < 128 * 128
    length = bytes([len(payload) & 127 | 128, len(payload) >> 7]) if sized else b""
    return bytes([kind << 3 | layer << 2 | sized << 1]) + b"\0" * layer + length + payload


def reduced(width: int, height: int, bits: int = 16, colour: tuple[int, int] | None = (1, 13)) -> bytes:
    """A sequence header of a still picture alone."""
    header = Written().f(3).f(1, 1).f(1, 1).f(5, 8)
    _sides(header, width, height, bits).f(3).f(3)
    return _colours(header, colour).bytes()


def whole(
    width: int,
    height: int,
    bits: int = 16,
    *,
    timed: bool = False,
    zeros: int = 3,
    points: int = 1,
    ids: bool = False,
    screen: int = 2,
    colour: tuple[int, int] | None = None,
) -> bytes:
    """A sequence header with everything in it."""
    header = Written().f(3).f(1).f(1)
    header.f(1, timed)
    if timed:
        header.f(32, 1).f(32, 25).f(1, 1).f(zeros).f(1, 1).f(zeros, 1)
        header.f(1, 1).f(5, 9).f(32, 7).f(5, 9).f(5, 11)
    header.f(1, timed).f(5, points - 1)
    for _ in range(points):
        header.f(12).f(5, 9).f(1, 1)
        if timed:
            header.f(1, 1).f(10, 3).f(10, 5).f(1).f(1, 1).f(4, 2)
    _sides(header, width, height, bits)
    header.f(1, ids)
    if ids:
        header.f(4, 2).f(3, 1)
    header.f(3).f(4).f(1, 1).f(2)
    header.f(1, screen == 2)
    if screen != 2:
        header.f(1, screen)
    if screen:
        header.f(1, 1)
    header.f(3, 6).f(3)
    return _colours(header, colour).bytes()


def frame(*, shown: int = 1, kind: int = 0, existing: int = 0, override: int = 0, ids: bool = False) -> bytes:
    """The beginning of a frame's header, for `whole` with screen tools that each frame chooses."""
    header = Written().f(1, existing).f(2, kind).f(1, shown)
    header.f(1).f(1, 1).f(1, 1)
    if ids:
        header.f(2 + 1 + 3, 9)
    return header.f(1, override).f(16, 65535).bytes()


def _sides(header: Written, width: int, height: int, bits: int) -> Written:
    return header.f(4, bits - 1).f(4, bits - 1).f(bits, width - 1).f(bits, height - 1)


def _colours(header: Written, colour: tuple[int, int] | None) -> Written:
    header.f(1).f(1).f(1, colour is not None)
    return header.f(8, colour[0]).f(8, colour[1]).f(8, 6) if colour else header
