"""Around every request: its id, its line in the log, its count in the metrics.

Pure ASGI, so that a client's disconnect stays visible to the handlers.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.door.bounds import PROBES
from app.api.door.traceparent import Parent, parent_of
from app.api.errors import BUG, CLIENT_GONE, LONGEST, REMOTE, STATUS
from app.errors import TooLarge, TooManyBytes
from app.metrics import Metrics
from app.text import one_line

log = logging.getLogger("app.access")
OPS = {"/encode": "encode", "/decode": "decode", "/compare": "compare"}
OFTEN = PROBES | {"/metrics"}
"""Paths that machines ask for every few seconds."""
REFUSED = frozenset(STATUS[each].code for each in (TooLarge, TooManyBytes))
"""Codes that are counted here; whoever else refuses counts itself."""
SAFE_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")


@dataclass(frozen=True)
class Served:
    """A request that has its end."""

    name: str  # its method and its route
    status: int
    started: float  # on time.perf_counter(), as the times below
    stages: Sequence[tuple[str, float, float]]  # name, start, end
    parent: Parent | None
    attributes: dict[str, str | int]  # as OpenTelemetry calls them


Trace = Callable[[Served], str | None]
"""Makes spans of it, and says the id of their trace."""


class Access:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics, trace: Trace | None = None) -> None:
        self.app = app
        self.metrics = metrics
        self.trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or passes other scopes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, stages=[])
        started = time.perf_counter()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            self._note(scope, status, started)

    def _note(self, scope: Scope, status: int, started: float) -> None:
        path, state, seconds = scope["path"], scope["state"], time.perf_counter() - started
        model = state.get("model", "")
        if op := state.get("op") or OPS.get(path) or _remote(path):
            self.metrics.requests.labels(op, model, str(status)).inc()
            self.metrics.request_seconds.labels(op, model).observe(seconds)
        if status == BUG.status:
            state.setdefault("problem", (BUG.code, "an unexpected error; see its traceback"))
        found = state.get("problem")
        if found and found[0] in REFUSED:
            self.metrics.rejected.labels(found[0]).inc()
        elif status == CLIENT_GONE:
            self.metrics.cancelled.labels("request").inc()
        facts = {
            "method": scope["method"],
            "path": quote(path[:LONGEST]),  # decoded, it may hold line breaks
            "status": status,
            "ms": round(seconds * 1000, 1),
            "model": model,
            "request_id": state["request_id"],
        }
        if trace_id := self._trace(scope, status, started):
            facts["trace_id"] = trace_id
        words = [f"{facts['method']} {facts['path']} {status} {facts['ms']} ms request={facts['request_id']}"]
        if trace_id:
            words.append(f"trace={trace_id}")
        if model:
            words.append(f"model={quote(model)}")
        if found:
            facts |= {"code": found[0], "reason": one_line(found[1])[:LONGEST]}
            words.append(f"{facts['code']}: {facts['reason']}")
        level = logging.DEBUG if path in OFTEN else logging.WARNING if status >= BUG.status else logging.INFO
        log.log(level, "%s", " ".join(words), extra={"facts": facts})

    def _trace(self, scope: Scope, status: int, started: float) -> str | None:
        """The id of the trace that the request is part of, if it is part of any."""
        parent = parent_of(scope["headers"])
        if self.trace is None or scope["path"] in OFTEN:
            return None if parent is None else parent.trace_id
        state, route = scope["state"], getattr(scope.get("route"), "path", "")
        attributes: dict[str, str | int] = {
            "http.request.method": scope["method"],
            "http.response.status_code": status,
            "url.path": scope["path"][:LONGEST],
            "latentd.request_id": state["request_id"],
        }
        attributes |= {"http.route": route} if route else {}
        attributes |= {"latentd.model": state["model"]} if state.get("model") else {}
        attributes |= {"error.type": state["problem"][0]} if state.get("problem") else {}
        name = f"{scope['method']} {route}".rstrip()
        return self.trace(Served(name, status, started, state["stages"], parent, attributes))


def _remote(path: str) -> str | None:
    op = path.rpartition("/")[2]
    return op if path.startswith(REMOTE) and op in ("encode", "decode") else None
