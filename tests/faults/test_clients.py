"""Clients that vanish at each stage of their request: nothing of theirs is computed, held or left behind."""

import asyncio
import socket
import struct
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from app.api import routes
from app.engine import compute
from tests.fakes import total
from tests.service import array_of, latent, listening, npy, until

BODY = npy(latent(1, 4, 16, 16))
QUERY = "/decode?model=kl&deterministic=true"


class Place:
    """A server, and where its threads can be held."""

    def __init__(self, server, port, monkeypatch):
        self.engine, self.port = server.engine, port
        self.room = server.config.app.state.context.room
        (self.worker,) = server.engine.workers
        self.patch = monkeypatch
        self.entered, self.go = threading.Event(), threading.Event()

    def held(self, where, name):
        """What `where.name` does waits from now on, on whichever thread."""
        real = getattr(where, name)

        def waits(*given, **more):
            self.entered.set()
            assert self.go.wait(60)
            return real(*given, **more)

        self.patch.setattr(where, name, waits)

    def count(self, name, **labels):
        return total(self.engine.metrics.registry, name, **labels)

    def rests(self):
        """Nothing is held."""
        (worker,) = self.engine.workers
        held = [worker.batcher.items, worker.batcher.pixels, worker.batcher.wait_seconds(), self.engine.open_requests]
        used = any(each.in_use for each in worker.cache.residents())
        return held == [0] * 4 and not (used or worker.busy or self.room.used)

    def decode(self):
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
            return array_of(client.post(QUERY, content=BODY, headers={"Accept": "application/x-npy"}))

    @contextmanager
    def asked(self, body=BODY, length=None):
        """A connection that has sent so much; it ends with a reset, as that of a process that was killed."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            head = (
                f"POST {QUERY} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY) if length is None else length}\r\n\r\n"
            )
            client.sendall(head.encode() + body)
            yield client
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture
def place(models, monkeypatch):
    with listening(models) as (server, port):
        place = Place(server, port, monkeypatch)
        yield place
        place.go.set()


def wait(true):
    asyncio.run(until(true))


@pytest.mark.parametrize("stage", ["uploading", "loading", "queued", "computing", "writing"])
def test_whoever_vanishes_leaves_nothing_and_the_next_is_served(place, stage):
    if stage != "loading":
        expected = place.decode()
    items = place.count("vae_batch_items_total")
    if stage == "uploading":
        with place.asked(BODY[:-1]):
            wait(lambda: place.room.used >= len(BODY))
    elif stage == "loading":
        place.held(place.worker, "_load_module")
        with place.asked():
            wait(place.entered.is_set)
    elif stage == "writing":
        place.held(routes, "pictures_body")
        with place.asked():
            wait(place.entered.is_set)
    else:
        place.held(compute, "forward")
        with place.asked():
            wait(place.entered.is_set)
            if stage == "queued":
                for _ in range(3):  # the first is staged
                    with place.asked():
                        wait(lambda: place.engine.open_requests == 2)
                    wait(lambda: place.engine.open_requests == 1)
    if stage != "writing":
        wait(lambda: place.count("vae_cancelled_total", stage="request") == (4 if stage == "queued" else 1))
    place.go.set()
    wait(place.rests)
    assert place.engine.alive
    after = place.decode()
    if stage != "loading":
        assert np.array_equal(after, expected)
    assert place.count("vae_batch_items_total") - items <= 2  # the one that was on the device, and the one after
    assert place.count("vae_requests_total", status="500") == 0
