"""One service in this process without a server: requests and answers are values, and its state is a report."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from fastapi import FastAPI
from prometheus_client import generate_latest

from app.engine.engine import Engine
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
    """The app of `app.main`, started, and its models folder read; `async with` ends it."""

    def __init__(self, settings: Settings) -> None:
        self.app: FastAPI = create_app(settings)
        self.engine: Engine = self.app.state.context.engine
        self._stack = AsyncExitStack()
        self._reports = 0
        self.loads = Loads(self.engine)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
        await self.engine.first_scan()  # idle, it would draw requests for models that it does not know yet
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

    def wait(self) -> float:
        """Seconds until the work that is queued should be done: of several devices the shortest."""
        return min(worker.batcher.wait_seconds() for worker in self.engine.workers)

    def report(self) -> Report:
        """What a router should know, now. Reports are counted: nobody else may ask for one."""
        self._reports += 1
        ready = self.engine.ready and self.engine.alive
        return Report(
            self._reports,
            tuple(residents(self.engine)),
            room=max(worker.cache.room for worker in self.engine.workers),
            wait=self.wait(),
            load=self.loads.seconds(),
            ready=ready,
        )


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


def residents(engine: Engine) -> Iterator[Resident]:
    """The models that are on a device, by all their names."""
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
    for sha256, size in nbytes.items():
        yield Resident(tuple(names.get(sha256, ())), sha256, size)


class Loads:
    """How long loads take lately: the first ones of a process set libraries up, and say nothing of the others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: float | None = None
        self._seen: tuple[float, float] | None = None  # seconds and loads that are in it, or are not to be

    def seconds(self) -> float | None:
        """The mean of those since the last call, averaged with what it said then; None before there is one."""
        total, count = self._of_all("sum"), self._of_all("count")
        if self._seen is None:
            self._seen = (total, count) if count else None
        elif count > self._seen[1]:
            mean = (total - self._seen[0]) / (count - self._seen[1])
            self._last = mean if self._last is None else (self._last + mean) / 2
            self._seen = total, count
        return self._last

    def _of_all(self, part: str) -> float:
        value = self._engine.metrics.registry.get_sample_value
        name = f"vae_model_load_duration_seconds_{part}"
        return sum(value(name, {"device": worker.name}) or 0.0 for worker in self._engine.workers)
