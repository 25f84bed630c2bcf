"""Both shells against services that break off, answer with anything, never end, or lie."""

import gzip
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentd_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Overloaded,
    TooLarge,
    Unavailable,
    UnexpectedAnswer,
    Unreachable,
)
from latentd_client.steps import Policy
from tests.service import latent, npy, pixels, read_request, saying, told

NPY = "application/x-npy"
PROBLEM = "application/problem+json"
ROWS = told(200, "application/json", b'{"models": []}')
ONCE: dict[str, Any] = {"policy": Policy(retries=0, most=1 << 20)}


def problem(status: int, code: str, retryable: bool, **headers: str) -> bytes:
    body = {"code": code, "detail": "so it is", "retryable": retryable, "request_id": "r"}
    return told(status, PROBLEM, json.dumps(body).encode(), **headers)


def endless(begin: bytes, piece: bytes = bytes(1 << 16), pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Bytes that come until nobody takes them."""

    def answer(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(begin)
        while True:
            peer.sendall(piece)
            time.sleep(pause)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Ty",
        told(200, NPY, npy(latent()))[:-1],
        told(200, NPY, npy(latent()), Content_Length="1000000"),
        b"HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        endless(b"HTTP/1.1 200 OK\r\n", b"X-More: more\r\n" * 1000),
    ],
)
def test_who_breaks_off_or_speaks_no_http_is_unreachable_and_asked_again(do, answer):
    with saying(answer) as url, pytest.raises(Unreachable):
        do(url, "encode", pixels(), client=ONCE)
    with saying(answer, ROWS) as url:
        assert do(url, "models", client={"policy": Policy(first_wait=0.0)}) == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (told(200, "text/html", b"<html>"), "got HTTP 200 text/html"),
        (told(200, "application/json", b"{}"), "got HTTP 200 application/json"),
        (told(418, "text/plain", b"x"), "got HTTP 418"),
        (told(500, PROBLEM, b"[" * 60_000), "got HTTP 500"),
        (told(500, PROBLEM, b"[]"), "got HTTP 500"),
        (told(302, "text/html", Location="http://else.where/encode"), "HTTP 302 to http://else.where/encode"),
        (told(307, "text/html", Location="https://else.where/encode"), "HTTP 307 to https://else.where/encode"),
        (told(200, NPY, gzip.compress(bytes(9 << 20)), Content_Encoding="gzip"), "in gzip"),
        (endless(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\n\r\n"), "more than 1048576 bytes"),
        (endless(b"HTTP/1.1 404 No\r\nContent-Type: text/html\r\n\r\n"), "got HTTP 404"),
    ],
)
def test_who_answers_something_else_is_told_and_not_asked_again(do, answer, words):
    with saying(answer, told(200, NPY, npy(latent()))) as url, pytest.raises(UnexpectedAnswer, match=words):
        do(url, "encode", pixels(), client={"policy": Policy(most=1 << 20, first_wait=0.0)})


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b'{"models": {"a": 1}}', b"\xff", b"null"])
def test_json_that_is_none(do, content):
    with saying(told(200, "application/json", content)) as url, pytest.raises(UnexpectedAnswer):
        do(url, "models", client=ONCE)


@pytest.mark.parametrize("content", [b"<html>", npy(latent())[:-1], npy(latent()).replace(b"(1, 4", b"(9, 4")])
def test_an_array_that_is_none(do, content):
    with saying(told(200, NPY, content)) as url:
        answer = do(url, "encode", pixels(), client=ONCE)
    with pytest.raises(UnexpectedAnswer):
        _ = answer.array


@pytest.mark.parametrize("headers", [{}, {"Retry_After": "0"}, {"Retry_After": "soon"}, {"Retry_After": "9" * 6000}])
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(413, "too_large", TooLarge), (429, "overloaded", Overloaded), (503, "unavailable", Unavailable)],
)
def test_what_is_refused_now_is_asked_again_and_what_is_too_large_is_not(do, status, code, kind, headers):
    again = status != 413
    soon = len(headers.get("Retry_After", "")) < 10
    policy = {"policy": Policy(first_wait=0.01, longest_wait=0.1)}
    with saying(problem(status, code, again, **headers), ROWS) as url:
        if again and soon:
            assert do(url, "models", client=policy) == []
        else:
            with pytest.raises(kind, match="so it is"):
                do(url, "models", client=policy)
    with saying(problem(status, code, again, **headers)) as url, pytest.raises(kind, match="so it is") as caught:
        do(url, "models", client=policy)
    assert (caught.value.status, caught.value.retryable) == (status, again)


def test_a_refusal_before_the_body_is_read(do):
    def answer(peer: socket.socket) -> None:
        peer.recv(1 << 10)
        peer.sendall(problem(413, "too_large", False))

    with saying(answer) as url, pytest.raises(TooLarge):
        do(url, "encode", np.zeros((2048, 2048, 3), np.uint8), client=ONCE)


def test_an_answer_that_trickles_ends_at_the_deadline(do):
    begin = told(200, NPY, Content_Length="1000000")
    policy = Policy(retries=0, timeout=0.2)
    with saying(endless(begin, b"H", 0.05)) as url:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            do(url, "encode", pixels(), client={"policy": policy})
        assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        told(302, "text/html", Location="http://else.where/"),
        told(200, PROBLEM, b"{}"),
        told(200, "multipart/x-mixed-replace", b"no boundary"),
        told(200, "multipart/x-mixed-replace; boundary=a", b"--a\r\nContent-Length: 99999999999\r\n\r\n"),
        endless(b"HTTP/1.1 500 No\r\nContent-Type: text/html\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"),
    ],
)
async def test_a_stream_that_is_none(answer):
    with saying(answer) as url:
        with (
            pytest.raises((UnexpectedAnswer, Unreachable)),
            Client(url, **ONCE) as client,
            client.look_on("a") as pictures,
        ):
            next(pictures)
        with pytest.raises((UnexpectedAnswer, Unreachable)):
            async with AsyncClient(url, **ONCE) as awaited, awaited.look_on("a") as coming:
                await anext(coming)
