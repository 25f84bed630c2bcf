import time

import pytest

from app.api.door.form import MAX_PARTS, naming, parts_of
from app.errors import InvalidImage, InvalidParameter, MalformedBody

TYPE = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
END = b"\r\n--b--\r\n"


def contents(body: bytes, content_type: str = TYPE) -> list[bytes]:
    return [bytes(part.content) for part in parts_of(memoryview(body), content_type)]


@pytest.mark.parametrize(
    "content", [b"x", b"", b"\r\n", b"--bb", b"\r\n--a", b"\r\n--bb", b"\r\n\r\n\r\n", bytes(range(256)) * 300]
)
def test_every_byte_of_a_part_is_kept(content):
    assert contents(HEAD + content + END) == [content]
    assert contents(b"preamble\r\n" + HEAD + content + b"\r\n" + HEAD + b"y" + END + b"epilogue") == [content, b"y"]


def test_a_part_that_ends_where_a_search_does(monkeypatch):
    monkeypatch.setattr("app.wire.scan.PIECE", 64)
    for length in range(60, 200):
        assert contents(HEAD + bytes(length) + END) == [bytes(length)]


def test_parts_are_views_of_the_body():
    body = bytearray(HEAD + b"x" + END)
    (part,) = parts_of(memoryview(body), TYPE)
    body[len(HEAD)] = ord("y")
    assert bytes(part.content) == b"y"


@pytest.mark.parametrize(
    "head",
    [
        b'--b\r\ncontent-disposition:form-data;name="image"\r\n\r\n',
        b'--b \t\r\nX: y\r\nContent-Disposition: form-data; name=image; filename="x"\r\n\r\n',
    ],
)
def test_headers_in_other_dresses(head):
    assert contents(head + b"x" + END) == [b"x"]
    assert contents(head + b"x" + END, 'Multipart/Form-Data; charset=utf-8; boundary="b"') == [b"x"]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "last boundary"),
        (HEAD + b"x", "last boundary"),
        (HEAD + b"x\r\n--b\r\n", "last boundary"),
        (b"--b\r\n--b--\r\n", "part 0 has no headers"),
        (HEAD + b"x\r\n--b\r\nX: y\r\n\r\nz" + END, "part 1 has no headers"),
        (b"--b\r\nX: " + bytes(10_000) + b"\r\n\r\nz" + END, "part 0 has no headers"),
        ((HEAD + b"x\r\n") * (MAX_PARTS + 1) + b"--b--\r\n", f"more than {MAX_PARTS} parts"),
        ((HEAD.replace(b"image", b"other") + b"x\r\n") * (MAX_PARTS + 1) + b"--b--\r\n", f"more than {MAX_PARTS}"),
    ],
)
def test_broken_forms(body, match):
    with pytest.raises(MalformedBody, match=match):
        parts_of(body, TYPE)


@pytest.mark.parametrize("content_type", ["multipart/form-data", TYPE.replace("=b", "="), TYPE.replace("b", "b" * 300)])
def test_a_boundary_that_is_none(content_type):
    with pytest.raises(MalformedBody, match="no boundary"):
        parts_of(HEAD + b"x" + END, content_type)


def test_other_names_are_named():
    with pytest.raises(InvalidParameter, match="named image; this form has 'mask'"):
        parts_of(HEAD + b"x\r\n" + HEAD.replace(b"image", b"mask") + b"x" + END, TYPE)


def test_near_boundaries_take_no_time():
    body = HEAD + b"\r\n--" * 4_000_000 + END
    at = time.perf_counter()
    assert len(contents(body)[0]) == 16_000_000
    assert time.perf_counter() - at < 5


def test_an_error_names_its_part():
    parts = parts_of(HEAD + b"x\r\n" + HEAD.replace(b'; filename="a.png"', b"") + b"y" + END, TYPE)
    assert [part.label for part in parts] == ["part 0 (a.png)", "part 1"]
    with pytest.raises(InvalidImage, match=r"^part 0 \(a\.png\): too odd$"), naming(parts[0]):
        raise InvalidImage("too odd")
