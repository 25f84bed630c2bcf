import pytest

from app.errors import MalformedBody
from app.wire.avif.boxes import MAX_BOXES, Fields, box, boxes


def listed(body: bytes, within: slice | None = None) -> list[tuple[bytes, bytes]]:
    view = memoryview(body)
    return [(name, bytes(view[where])) for name, where in boxes(view, within or slice(0, len(body)))]


def test_what_is_written_is_read():
    assert listed(box(b"free", b"a", b"b") + box(b"mdat")) == [(b"free", b"ab"), (b"mdat", b"")]


def test_long_lengths_and_the_last_box():
    body = b"\0\0\0\1wide" + (18).to_bytes(8) + b"ab" + b"\0\0\0\0mdatrest"
    assert listed(body) == [(b"wide", b"ab"), (b"mdat", b"rest")]


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\0\0\0\1", b"\0\0\0\x20"])
def test_a_box_ends_with_what_is_around_it(length):
    far = b"\xff" * 8 if length == b"\0\0\0\1" else b""
    body = length + b"mdat" + far + b"data"
    assert listed(body) == [(b"mdat", b"data")]
    assert listed(body + b"beyond", slice(0, len(body))) == [(b"mdat", b"data")]


@pytest.mark.parametrize("body", [b"", b"\0\0\0", b"\0\0\0\x08abc", b"\0\0\0\1"])
def test_less_than_a_header_is_no_box(body):
    assert listed(body) == []


@pytest.mark.parametrize("body", [b"\0\0\0\7free", b"\0\0\0\1free" + (15).to_bytes(8), b"\0\0\0\1free"])
def test_a_length_shorter_than_its_own_header_goes_nowhere(body):
    with pytest.raises(MalformedBody, match="less than its own header"):
        listed(body)


def test_boxes_are_counted():
    assert len(listed(box(b"free") * MAX_BOXES)) == MAX_BOXES
    with pytest.raises(MalformedBody, match="more than"):
        listed(box(b"free") * (MAX_BOXES + 1))


def test_fields():
    fields = Fields(memoryview(b"\1\0\0\2\0\5abc"), slice(0, 9))
    assert (fields.version(), fields.number(2), fields.number(0), fields.take(2)) == ((1, 2), 5, 0, b"ab")
    with pytest.raises(MalformedBody, match="ends too early"):
        fields.number(2)
