"""The parts of an endless answer, cut anywhere."""

import httpx
import pytest

from latentd_client import UnexpectedAnswer, UnknownStream
from latentd_client.parts import MIXED, MOST, Parts


def answer(kind=f'{MIXED}; boundary="b"', status=200, **more):
    return httpx.Response(status, headers={"Content-Type": kind}, **more)


def part(content, request_id):
    head = f"Content-Type: image/webp\r\nContent-Length: {len(content)}\r\nX-Preview: linear\r\n"
    return f"{head}X-Request-Id: {request_id}\r\n\r\n".encode() + content + b"\r\n--b\r\n"


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_pictures_come_once_each_wherever_the_bytes_are_cut(step):
    first = b"\r\n--b\r\n\r\n\r\n"  # nothing inside of a picture is a boundary
    sent = b"--b\r\n" + part(first, "1") + part(first, "1") + part(b"second", "2")
    parts, found = Parts(answer()), []
    for start in range(0, len(sent), step):
        found += parts.feed(sent[start : start + step])
    assert [(each.content, each.request_id, each.preview) for each in found] == [
        (first, "1", "linear"),
        (b"second", "2", "linear"),
    ]
    assert found[0].media == "image/webp"


@pytest.mark.parametrize(
    "sent",
    [
        b"--other\r\n",
        b"--b\r\nContent-Type: image/webp\r\n\r\n",
        b"--b\r\nnonsense\r\n\r\n",
        b"--b\r\nContent-Length: -1\r\n\r\n",
        b"--b\r\nContent-Length: %d\r\n\r\n" % (MOST + 1),
        b"--b\r\nContent-Length: 1\r\n\r\nxyz\r\n--b\r\n",
        b"--b\r\n" + b"x" * (MOST + 1),
    ],
)
def test_what_is_not_latentd_s(sent):
    with pytest.raises(UnexpectedAnswer):
        Parts(answer()).feed(sent)


def test_an_answer_that_has_none():
    with pytest.raises(UnexpectedAnswer, match="text/html"):
        Parts(answer("text/html", content=b""))
    problem = {"code": "unknown_stream", "detail": "nobody", "retryable": False, "request_id": "r"}
    with pytest.raises(UnknownStream):
        Parts(answer("application/problem+json", 404, json=problem))
