"""Around every request: its id, its line in the log, its count in the metrics.

Pure ASGI, so that a client's disconnect stays visible to the handlers.
"""

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import CLIENT_GONE, LONGEST
from app.metrics import Metrics

log = logging.getLogger("app.access")
OPS = {"/encode": "encode", "/decode": "decode", "/compare": "compare"}
SAFE_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")


class Access:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or passes other scopes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
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
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path, state = scope["path"], scope["state"]
        model = state.get("model", "")
        if op := OPS.get(path):
            self.metrics.requests.labels(op, model, str(status)).inc()
            self.metrics.request_seconds.labels(op, model).observe(seconds)
        if status == 413:
            self.metrics.rejected.labels("too_large").inc()
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
        log.info("%(method)s %(path)s %(status)d %(ms).1f ms", facts, extra={"facts": facts})
