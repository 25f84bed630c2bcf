"""Sockets by the thousand that say nothing, or half of something, beside one that asks."""

import asyncio
import random
import resource
import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx

from tests.service import array_of, latent, listening, npy, until

BODY = npy(latent())
HEAD = b"POST /decode?model=kl HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
ABUSES = (
    b"",
    b"\r\n",
    b"POST /decode",
    HEAD % len(BODY),
    HEAD % len(BODY) + BODY[:-1],
    HEAD % (len(BODY) + 1) + BODY,
    b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\nhalf",
    b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /healthz/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET /mod",
    b"\x16\x03\x01\x02\x00" + bytes(40),  # a handshake of TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
SPARE_FILES = 400
"""Of this process, which has both ends of each connection."""


def files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_thousands_that_are_idle_or_broken_take_neither_answers_nor_health_and_leave_nothing(models):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = (hard if hard != resource.RLIM_INFINITY else max(soft, 8192)) - SPARE_FILES
    count, rng = min(3000, room // 2), random.Random(0)
    assert count > 200
    with listening(models, max_connections=4096) as (server, port), ExitStack() as open_ones:
        url, app = f"http://127.0.0.1:{port}", cast(Any, server.config.app)
        held = app.state.context.room
        with httpx.Client(base_url=url, timeout=60) as client:
            decode = partial(client.post, "/decode?model=kl", content=BODY, headers={"Accept": "application/x-npy"})
            expected = array_of(decode())
            asyncio.run(until(lambda: len(server.server_state.connections) == 1))
            before = files()
            for index in range(count):
                made = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
                made.sendall(rng.choice(ABUSES))
                if index % (count // 10) == 0:
                    began = time.monotonic()
                    assert client.get("/healthz/live").status_code == 200
                    assert time.monotonic() - began < 5  # of a machine that may do other things besides
            assert (array_of(decode()) == expected).all()
            open_ones.close()
            asyncio.run(until(lambda: len(server.server_state.connections) <= 1))
            assert (array_of(decode()) == expected).all()
            asyncio.run(until(lambda: not (server.engine.open_requests or held.used)))
            assert files() <= before + 2


def test_requests_that_are_sent_behind_each_other_are_answered_in_their_order(models):
    with listening(models) as (_, port), socket.create_connection(("127.0.0.1", port)) as made:
        names = [f"number-{index}" for index in range(20)]
        for name in names:
            made.sendall(f"GET /healthz/live HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\n\r\n".encode())
        made.settimeout(60)
        came = b""
        while came.lower().count(b"x-request-id: number-") < len(names):
            more = made.recv(1 << 16)
            assert more
            came += more
        places = [came.index(name.encode() + b"\r\n") for name in names]
        assert places == sorted(places)
