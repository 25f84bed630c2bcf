"""What stands around all routes, the outermost last, of the service and of a door before several of it."""

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app.api import errors, openapi
from app.api.door.access import Access, Trace
from app.api.door.bounds import Bounds
from app.api.door.prefix import Prefix
from app.api.door.room import Room
from app.metrics import Metrics

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
ASKED = ("Authorization", "Content-Type", "X-Request-Id", "X-Request-Timeout-Ms", "X-Latents-Family", "traceparent")
TOLD = sorted({*openapi.ENCODED, *openapi.DECODED, *openapi.COMPARED, "Retry-After"})
"""What pages of other origins may do, say and read: what every client may."""


def install(
    app: FastAPI,
    room: Room,
    metrics: Metrics,
    *,
    origins: Sequence[str] = (),
    prefix: str = "",
    trace: Trace | None = None,
) -> None:
    """Errors as problems, bounds, CORS where there are `origins`, the log, and a proxy's prefix taken off."""
    errors.install(app)
    app.add_middleware(Bounds, room=room)
    if origins:
        app.add_middleware(CORSMiddleware, origins, METHODS, ASKED, expose_headers=TOLD)
    app.add_middleware(Access, metrics=metrics, trace=trace)
    if prefix:
        app.add_middleware(Prefix, prefix=prefix)
