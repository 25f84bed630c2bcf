"""One service in this process without a server: requests and answers are values, and its state is a report."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from fastapi import FastAPI
from prometheus_client import generate_latest

from app.engine.engine import LOAD_SECONDS, Engine
from app.main import create_app
from app.settings import Settings
from app.store.checkpoint import Checkpoint
from deploy.routing import DEFAULT, Report, Resident

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Call:
    """A whole request; `model` is what it names, for whoever routes it."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    model: str | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes


class Service:
    """The app of `app.main`, started; `async with` ends it."""

    def __init__(self, settings: Settings) -> None:
        self.app: FastAPI = create_app(settings)
        self.engine: Engine = self.app.state.context.engine
        self._stack = AsyncExitStack()
        self._reports = 0
        self._loads = Loads(self.engine)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def answer(self, call: Call) -> Answer:
        """Serves one request. Cancelled, it cancels the request's work as a client does that goes away."""
        return await answer(self.app, call)

    def metrics(self) -> str:
        """As `/metrics` has them."""
        self.engine.forget_gone()
        return generate_latest(self.engine.metrics.registry).decode()

    def report(self) -> Report:
        """What a router should know, now."""
        self._reports += 1
        return report_of(self.engine, self._reports, self._loads.seconds())


async def answer(app: Any, call: Call) -> Answer:
    """What an ASGI app answers to a request."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": list(call.headers),
        "client": None,
        "server": None,
        "state": {},
    }
    body = iter((call.body,))
    status = 500
    headers: Headers = ()
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        for content in body:
            return {"type": "http.request", "body": content}
        await asyncio.Event().wait()  # the client is there until this task is cancelled
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return Answer(status, headers, b"".join(pieces))


def report_of(engine: Engine, number: int, load: float) -> Report:
    """The state of an engine. With several devices the queue is the shortest one's, the room the largest."""
    default = engine.meant()
    names: dict[str, list[str]] = {}
    for entry in engine.store.entries():
        if isinstance(entry, Checkpoint):
            names.setdefault(entry.sha256, []).append(entry.name)
    if default is not None:
        names.setdefault(default.sha256, []).append(DEFAULT)
    nbytes: Counter[str] = Counter()  # of all its precisions
    for resident in (resident for worker in engine.workers for resident in worker.cache.residents()):
        nbytes[resident.checkpoint.sha256] += resident.nbytes
    return Report(
        number,
        tuple(Resident(tuple(names.get(sha256, ())), sha256, size) for sha256, size in nbytes.items()),
        room=max(worker.cache.room for worker in engine.workers),
        wait=min(worker.batcher.wait_seconds() for worker in engine.workers),
        load=load,
    )


class Loads:
    """How long loads take lately: the first one of a process sets libraries up, and says nothing of the others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last = LOAD_SECONDS
        self._sum = self._count = 0.0

    def seconds(self) -> float:
        """The mean of those since the last call, averaged with what it said then."""
        total, count = self._of_all("sum"), self._of_all("count")
        if count > self._count:
            mean = (total - self._sum) / (count - self._count)
            self._last = (self._last + mean) / 2
            self._sum, self._count = total, count
        return self._last

    def _of_all(self, part: str) -> float:
        value = self._engine.metrics.registry.get_sample_value
        name = f"vae_model_load_duration_seconds_{part}"
        return sum(value(name, {"device": worker.name}) or 0.0 for worker in self._engine.workers)
