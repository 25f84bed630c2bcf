"""The door before several replicas: reads a request whole, has one answer it, and another where that one dies.

It knows no Ray: what reaches the replicas is handed in. What a request may cost is bounded here as in the service
itself (`app.api.bounds`, `app.api.body`); what it means is for the replica that answers it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from urllib.parse import parse_qs

from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from app.api import middleware
from app.api.context import check_key
from app.api.door.body import deadline_of, read_body, while_connected
from app.api.door.room import Room
from app.api.errors import REMOTE
from app.api.keys import Keys
from app.errors import DeadlineExceeded, Unavailable
from app.metrics import Metrics
from deploy.replica import Answer, Call
from deploy.routing import DEFAULT

TRIES = 3
"""Of one request: what kills three replicas is the request's own doing, or the end of the cluster."""

PROBE_SECONDS = 2.0
"""That replicas have to say how they are."""

WORK = frozenset({"/encode", "/decode", "/compare"})
"""Pure: the same request gives the same answer wherever and however often it runs. So do those below REMOTE."""

STREAM = "/preview/stream"
"""Two connections that must meet in one replica, and one of them has no end."""

HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"content-length"})
"""Headers of the connection, not of the message."""

OWN = frozenset({b"x-request-id"})
"""What `Access` says here."""


class ReplicaDied(Exception):
    """The replica ended before its answer was there."""


@dataclass(frozen=True)
class Replicas:
    """What reaches them."""

    answer: Callable[[Call], Awaitable[Answer]]
    """The answer of one of them, chosen by `call.model`. Raises ReplicaDied, Overloaded, Unavailable."""

    metrics: Callable[[float], Awaitable[Sequence[tuple[str, str]]]]
    """(id, text of its metrics) of all; of none where one does not answer within so many seconds."""


@dataclass(frozen=True)
class Door:
    """What may come in."""

    body_bytes: int
    buffer_bytes: int
    api_keys: Keys
    admin_keys: Keys
    metrics_public: bool = True
    origins: tuple[str, ...] = ()
    root_path: str = ""


def create_ingress(replicas: Replicas, door: Door) -> FastAPI:
    """The ASGI app."""
    metrics = Metrics(CollectorRegistry())
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    room = Room(door.buffer_bytes)

    async def check(request: Request) -> None:
        check_key(request, await door.api_keys.current(), await door.admin_keys.current())

    @app.get("/healthz/live")
    @app.get("/health")
    @app.get("/livez")
    @app.get("/v2/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/healthz/ready")
    @app.get("/healthz/startup")
    @app.get("/readyz")
    @app.get("/v2/health/ready")
    async def ready() -> dict[str, str]:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                answer = await replicas.answer(Call("GET", "/healthz/ready", b"", (), b""))
        except (TimeoutError, ReplicaDied):
            raise Unavailable("no replica says that it is ready") from None
        if answer.status != HTTPStatus.OK:
            raise Unavailable("the replica that was asked is not ready")
        return {"status": "ok"}

    @app.get("/metrics")
    async def all_metrics(request: Request) -> Response:
        if not door.metrics_public:
            await check(request)
        own = "ingress", generate_latest(metrics.registry).decode()
        texts = [own, *await replicas.metrics(PROBE_SECONDS)]
        merged = await asyncio.to_thread(generate_latest, Merged(texts))
        return Response(merged, media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def passed_on(request: Request) -> Response:
        path, query = request.scope["path"], request.scope["query_string"]
        works = request.method != "GET"
        if path == STREAM or (works and path not in WORK and not path.startswith(REMOTE)):
            raise HTTPException(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"{request.method} {path[:200]} would reach one replica of many; the models folder is one",
            )
        if works:
            await check(request)
        deadline = deadline_of(request)
        body = bytes(await read_body(request, door.body_bytes))
        request.state.held.add(len(body))  # the copy
        headers = [(name, value) for name, value in request.headers.raw if name not in HOP | OWN]
        headers += [(b"x-request-id", request.state.request_id.encode()), (b"content-length", b"%d" % len(body))]
        call = Call(request.method, path, query, headers, body, model_of(path, query))
        answer = await while_connected(request, tried(replicas.answer, call, deadline))
        response = Response(answer.body, answer.status)
        response.raw_headers += [(name, value) for name, value in answer.headers if name not in HOP | OWN]
        return response

    middleware.install(app, room, metrics, origins=door.origins, prefix=door.root_path)
    return app


async def tried(answer: Callable[[Call], Awaitable[Answer]], call: Call, deadline: float | None) -> Answer:
    """The answer, from another replica where one dies under it; within the deadline, which each try is told anew."""
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            for _ in range(TRIES):
                try:
                    return await answer(_timed(call, deadline))
                except ReplicaDied as error:
                    died = error
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before a replica had the answer") from None
    raise Unavailable(f"{TRIES} replicas died under this request: {died}")


def model_of(path: str, query: bytes) -> str | None:
    """The model that a request's work is for, as it is named there; DEFAULT where work names none."""
    if path.startswith(REMOTE):
        return path.removeprefix(REMOTE).rpartition("/")[0] or None
    if path in ("/encode", "/decode"):
        return parse_qs(query.decode("latin-1"), errors="replace").get("model", [DEFAULT])[0]
    return None


class Merged(CollectorRegistry):
    """Metrics of several processes as one text: every sample says whose it is."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        """Each family once, with the samples of all."""
        families: dict[str, Metric] = {}
        for replica, text in self._texts:
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                family.samples += [each._replace(labels={**each.labels, "replica": replica}) for each in found.samples]
        return families.values()


def _timed(call: Call, deadline: float | None) -> Call:
    """The call, with what is left of its client's patience."""
    if deadline is None:
        return call
    left = max(1, round((deadline - time.monotonic()) * 1000))
    headers = [(name, value) for name, value in call.headers if name != b"x-request-timeout-ms"]
    return replace(call, headers=[*headers, (b"x-request-timeout-ms", b"%d" % left)])
