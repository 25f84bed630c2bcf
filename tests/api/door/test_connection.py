import asyncio
import json
import resource
import socket
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from app.api.door import connection
from app.api.door.connection import SPARE, SPARE_FILES, connections_for
from app.engine.engine import Engine
from tests.service import listening, occupied, picture, until

GET = b"GET /healthz/live HTTP/1.1\r\nHost: x\r\n\r\n"
MODELS = GET.replace(b"/healthz/live", b"/models")


@pytest.fixture(scope="module")
def server(models):
    with listening(models, default_model="kl") as (server, port):
        yield server, port


@contextmanager
def connected(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as made:
        yield made


def ended(made: socket.socket) -> bool:
    """Whether the server closes the connection; waits for what comes of it."""
    try:
        return made.recv(4096) == b""
    except ConnectionResetError:
        return True


def status(made: socket.socket, request: bytes) -> int:
    made.sendall(request)
    with made.makefile("rb", buffering=0) as incoming:
        first = incoming.readline()
        headers = dict(line.split(b": ", 1) for line in iter(incoming.readline, b"\r\n"))
        left = int(headers[b"content-length"])
        while left:
            left -= len(incoming.read(left) or b"")
    return int(first.split()[1])


@pytest.mark.parametrize("sent", [b"", b"GET /healthz/live HT", GET[:-2]])
def test_a_connection_without_a_whole_head_ends(server, monkeypatch, sent):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with connected(server[1]) as made:
        at = time.perf_counter()
        made.sendall(sent)
        assert ended(made)
        assert 0.1 < time.perf_counter() - at < 10


def test_a_byte_now_and_then_is_no_head(server, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with connected(server[1]) as made:
        assert status(made, GET) == 200
        made.settimeout(0.02)
        at = time.perf_counter()
        gone = False
        while not gone and time.perf_counter() - at < 20:
            try:
                made.sendall(b"G")
                gone = ended(made)
            except TimeoutError:
                continue
            except ConnectionError:
                gone = True
        assert gone
        assert time.perf_counter() - at < 10


def test_a_request_that_is_being_served_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    engine: Engine = server[0].engine
    with connected(server[1]) as made:
        body = picture()
        with occupied(engine):
            made.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            asyncio.run(until(lambda: engine.open_requests == 1))
            time.sleep(0.5)
        assert b" 200 " in made.recv(4096).splitlines()[0]


def test_a_client_that_takes_nothing_is_dropped_and_its_answer_with_it(server, monkeypatch):
    monkeypatch.setattr(connection, "TAKE_SECONDS", 0.3)
    room = server[0].config.app.state.context.room
    monkeypatch.setattr("app.api.health.generate_latest", lambda _: bytes(30_000_000))
    with connected(server[1]) as made:
        made.sendall(GET.replace(b"/healthz/live", b"/metrics"))
        asyncio.run(until(lambda: room.used >= 30_000_000))
        asyncio.run(until(lambda: room.used == 0))
        while not ended(made):
            pass


def test_a_slow_client_that_takes_something_gets_all_of_it(server, monkeypatch):
    monkeypatch.setattr(connection, "TAKE_SECONDS", 2.0)
    monkeypatch.setattr("app.api.health.generate_latest", lambda _: bytes(8_000_000))
    with connected(server[1]) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        made.sendall(GET.replace(b"/healthz/live", b"/metrics").replace(b"Host: x", b"Host: x\r\nConnection: close"))
        taken = 0
        while got := made.recv(1 << 16):
            taken += len(got)
            time.sleep(0.005)
        assert taken > 8_000_000


def test_above_the_most_the_one_that_is_idle_longest_ends(models):
    with listening(models, max_connections=4) as (_, port), ExitStack() as open_ones:
        made = [open_ones.enter_context(connected(port)) for _ in range(4)]
        assert [status(each, GET) for each in made[1:]] == [200] * 3  # the first has never said a word
        new = open_ones.enter_context(connected(port))
        assert status(new, GET) == 200
        assert ended(made[0])
        assert status(made[1], MODELS) == 200


def test_above_the_most_busy_ones_health_is_answered_and_nothing_else(models, monkeypatch):
    monkeypatch.setattr(connection, "SPARE", 2)
    body = picture()
    request = b"POST /encode?model=kl HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with listening(models, max_connections=2) as (server, port), ExitStack() as open_ones:
        assert httpx.get(f"http://127.0.0.1:{port}/healthz/ready").status_code == 200  # started
        asyncio.run(until(lambda: not server.server_state.connections))
        with occupied(server.engine):
            busy = [open_ones.enter_context(connected(port)) for _ in range(2)]
            for each in busy:
                each.sendall(request)
            asyncio.run(until(lambda: server.engine.open_requests == 2))
            probe = open_ones.enter_context(connected(port))
            assert status(probe, GET) == 200
            refused = httpx.get(f"http://127.0.0.1:{port}/models")
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert refused.headers["Retry-After"] == "1"
            assert refused.headers["Connection"] == "close"
            assert refused.headers["X-Request-Id"] == refused.json()["request_id"]
        assert [int(each.recv(4096).split()[1]) for each in busy] == [200, 200]


@pytest.mark.parametrize("body", [b"Content-Length: 5", b"Content-Length: 0"])
def test_two_lengths_of_one_body_are_refused_and_the_connection_closed(server, body):
    """What stands before the service may go by the other one, and take the rest for another request."""
    with connected(server[1]) as made:
        head = b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + body + b"\r\n\r\n"
        made.sendall(head + b"0\r\n\r\n" + GET)
        with made.makefile("rb") as incoming:
            answer = incoming.read()  # to its end
    assert answer.count(b"HTTP/1.1") == 1
    assert b" 400 " in answer.splitlines()[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "malformed_body"


@pytest.mark.parametrize("path", [b"/healthz/live", b"/models", b"/metrics", b"/openapi.json", b"/nothing", b"/encode"])
def test_head_has_the_headers_of_get_and_no_body(server, path):
    with connected(server[1]) as made, made.makefile("rb") as incoming:
        answers = []
        for method in (b"GET", b"HEAD", b"HEAD"):
            made.sendall(method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n\r\n")
            first = incoming.readline()
            headers = dict(line.split(b": ", 1) for line in iter(incoming.readline, b"\r\n"))
            if method == b"GET":
                incoming.read(int(headers[b"content-length"]))
            elif path == b"/metrics":  # which counts itself
                headers.pop(b"content-length")
            headers.pop(b"date")
            answers.append((first, headers))
        if path == b"/metrics":
            answers[0][1].pop(b"content-length")
        assert answers[0] == answers[1] == answers[2]


def test_the_soft_limit_of_open_files_is_raised_and_what_there_is_divided(monkeypatch):
    limits = [(100, 10_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.insert(0, both))
    assert connections_for(1000) == 1000
    assert limits[0] == (10_000, 10_000)
    limits.insert(0, (100, 500))
    assert connections_for(1000) == 500 - SPARE - SPARE_FILES
    limits.insert(0, (100, resource.RLIM_INFINITY))
    assert connections_for(1000) == 1000
    assert limits[0] == (1000 + SPARE + SPARE_FILES, resource.RLIM_INFINITY)
    limits.insert(0, (64, 64))
    assert connections_for(1000) == 1

    def refuse(*_):
        raise ValueError("not allowed to exceed")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    limits.insert(0, (400, 10_000))
    assert connections_for(1000) == 400 - SPARE - SPARE_FILES
