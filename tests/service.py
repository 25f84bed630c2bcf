"""The service, stood up for a test; and the bodies that are sent to it."""

import asyncio
import io
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from app.engine.engine import Engine
from app.main import create_app
from app.server import Listening, Server, server_of
from app.settings import Settings
from tests.fakes import total

SIDE = 32
"""Pixels of most pictures here: one shape for the forecast to count, and little to compute."""


class Service:
    """An app and a client that reaches it without a socket."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client
        self.engine: Engine = app.state.context.engine
        self.get, self.post, self.request = client.get, client.post, client.request
        self.put, self.delete = client.put, client.delete

    def count(self, name: str, **labels: str) -> float:
        """The sum of a metric over all that have these labels."""
        return total(self.engine.metrics.registry, name, **labels)


@asynccontextmanager
async def serving(
    models: Path | str | tuple[Path, ...], *, headers: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[Service]:
    """A started service; a bug in it is an answer, not an exception of the test."""
    app = create_app(Settings(**{"models": models, "device": "cpu", **settings}))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers, timeout=None) as client,
    ):
        yield Service(app, client)


@contextmanager
def listening(models: Path, **options: Any) -> Iterator[tuple[Server, int]]:
    """A real server on a free port of the loopback, in a thread; and its port."""
    settings = Settings(**{"models": models, "device": "cpu", **options})
    app = create_app(settings)
    server = server_of(app, settings, Listening(port=0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def saying(*answers: bytes | Callable[[socket.socket], object]) -> Iterator[str]:
    """The address of somebody who answers the first request with the first of these, and so on; the last again.

    Bytes are sent as they are, then the connection ends; a function has the socket to itself.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def one(peer: socket.socket, answer: bytes | Callable[[socket.socket], object]) -> None:
        with peer, suppress(OSError):  # the client may leave when it likes
            if callable(answer):
                answer(peer)
            else:
                read_request(peer)
                peer.sendall(answer)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):  # a socket that is closed with bytes unread takes back what it sent
                pass

    def serve() -> None:
        left = list(answers)
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            answer = left.pop(0) if len(left) > 1 else left[0]
            threading.Thread(target=one, args=(peer, answer), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # closing alone wakes nobody
        listener.close()
        thread.join(5)


def read_request(peer: socket.socket) -> bytes:
    """A request with its body, if it states how long that is."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := peer.recv(1 << 16)):
            return data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += peer.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def told(status: int, media: str, content: bytes = b"", **headers: str) -> bytes:
    """An answer as it goes over the wire, the last of its connection; `_` in the name of a header is `-`."""
    lines = {"Content_Type": media, "Content_Length": str(len(content)), "Connection": "close"} | headers
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} x\r\n{head}\r\n".encode() + content


@contextmanager
def occupied(engine: Engine) -> Iterator[None]:
    """Keeps the device thread from computing."""
    release = threading.Event()
    engine.workers[0].thread._executor.submit(release.wait)
    try:
        yield
    finally:
        release.set()


async def until(true: Callable[[], bool]) -> None:
    """Waits for what other tasks and threads bring about."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110  the engine tells nobody
            await asyncio.sleep(0.01)


def pixels(width: int = SIDE, height: int = SIDE, seed: int = 0) -> np.ndarray:
    """A smooth random picture, uint8 (H, W, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0, kind: str = "PNG") -> bytes:
    """The same as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels(width, height, seed)).save(file, kind)
    return file.getvalue()


def latent(*shape: int, dtype: Any = np.float16, seed: int = 0) -> np.ndarray:
    """Random numbers; (1, 4, 4, 4) if nothing is said, which is a picture of SIDE pixels."""
    return np.random.default_rng(seed).standard_normal(shape or (1, 4, SIDE // 8, SIDE // 8)).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    """The file that numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def array_of(answer: httpx.Response) -> np.ndarray:
    """What numpy.load reads from an answer."""
    assert answer.status_code == 200, answer.text
    array: np.ndarray = np.load(io.BytesIO(answer.content), allow_pickle=False)
    return array


def picture_of(answer: httpx.Response) -> Image.Image:
    """What Pillow reads from an answer."""
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The detail of a problem+json of this status and code."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail", "instance", "code", "request_id", "retryable"}
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    detail: str = body["detail"]
    assert detail
    return detail
