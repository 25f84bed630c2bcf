"""The one table error -> status, and the problem+json (RFC 9457) that every error becomes."""

import logging
import math
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app import errors
from app.api.schemas import Problem
from app.store.checkpoint import CheckpointChanged
from app.text import one_line

log = logging.getLogger("app.api")

MEDIA = "application/problem+json"
REMOTE = "/remote/"
"""Below it errors look as Hugging Face's clients read them: `{"error": "..."}`."""
LONGEST = 1000
"""Characters of a detail or a path in an answer; either may quote what came."""
CLIENT_GONE = 499  # nginx's number: in the log and the metrics only, nobody is there to read it


class Unauthorized(errors.ServiceError):
    """No key, where one is needed."""


class Forbidden(errors.ServiceError):
    """A key that does not open this, or a route that is switched off."""


class UnknownStream(errors.ServiceError):
    """Nobody looks on at a stream of previews of that name."""


class SlowBody(errors.ServiceError):
    """The body did not arrive in time."""


class ClientGone(errors.ServiceError):
    """The client closed the connection; the answer goes nowhere and is only counted."""


@dataclass(frozen=True)
class Kind:
    """How an error looks on the wire."""

    status: int
    code: str
    retryable: bool = False  # the same request may succeed later


STATUS: dict[type[errors.ServiceError], Kind] = {
    errors.MalformedBody: Kind(400, "malformed_body"),
    Unauthorized: Kind(401, "unauthorized"),
    Forbidden: Kind(403, "forbidden"),
    errors.UnknownModel: Kind(404, "unknown_model"),
    UnknownStream: Kind(404, "unknown_stream"),
    errors.NotAcceptable: Kind(406, "not_acceptable"),
    SlowBody: Kind(408, "slow_body", retryable=True),
    errors.FamilyMismatch: Kind(409, "family_mismatch"),
    errors.ModelBusy: Kind(409, "model_busy", retryable=True),
    errors.ModelExists: Kind(409, "model_exists"),
    errors.ModelKept: Kind(409, "model_kept"),
    errors.TooLarge: Kind(413, "too_large"),
    errors.UnsupportedMedia: Kind(415, "unsupported_media"),
    errors.InvalidParameter: Kind(422, "invalid_parameter"),
    errors.InvalidImage: Kind(422, "invalid_image"),
    errors.InvalidLatent: Kind(422, "invalid_latent"),
    errors.UnsupportedCheckpoint: Kind(422, "unsupported_checkpoint"),
    errors.InvalidInput: Kind(422, "invalid_input"),
    errors.Overloaded: Kind(429, "overloaded", retryable=True),
    ClientGone: Kind(CLIENT_GONE, "client_gone"),
    errors.NonFiniteOutput: Kind(500, "non_finite_output"),
    errors.ServiceError: Kind(500, "internal_error"),
    CheckpointChanged: Kind(503, "model_changed", retryable=True),  # between the look at the folder and the load
    errors.TooManyBytes: Kind(503, "too_many_bytes", retryable=True),
    errors.Unavailable: Kind(503, "unavailable", retryable=True),
    errors.DeadlineExceeded: Kind(504, "deadline_exceeded", retryable=True),
    errors.OutOfMemory: Kind(507, "out_of_memory"),
    errors.DiskFull: Kind(507, "disk_full"),
}

BUG = STATUS[errors.ServiceError]


def kind_of(error: errors.ServiceError) -> Kind:
    """The row of the error's own class, or of the nearest one above it."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def problem(request: Request, error: errors.ServiceError, more: dict[str, str] | None = None) -> Response:
    """The answer to a request that failed with this error; `more` headers than it asks for by itself."""
    kind = kind_of(error)
    headers = dict(more or {})
    if isinstance(error, errors.Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif kind.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    elif kind.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer, Basic realm="latentd"'
    return _problem(request, kind, str(error), headers)


def _problem(request: Request, kind: Kind, detail: str, headers: dict[str, str] | None = None) -> Response:
    """The same of a kind and a text, problem+json but below REMOTE; its line in the log says them too."""
    request.scope.setdefault("state", {})["problem"] = kind.code, detail
    if str(request.scope["path"]).startswith(REMOTE):
        return JSONResponse({"error": one_line(detail)}, kind.status, headers)
    body = Problem(
        type=f"urn:latentd:problem:{kind.code}",
        title="Client Closed Request" if kind.status == CLIENT_GONE else HTTPStatus(kind.status).phrase,
        status=kind.status,
        detail=_cut(one_line(detail[: 2 * LONGEST])),
        instance=_cut(
            quote(request.scope["path"][:LONGEST])
        ),  # request.url would parse the Host header, whatever is in it
        code=kind.code,
        request_id=request_id(request),
        retryable=kind.retryable,
    )
    return JSONResponse(body.model_dump(), kind.status, headers, media_type=MEDIA)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def request_id(request: Request) -> str:
    """The id that `Access` gave the request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    return problem(request, error)


async def _invalid_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = []
    for found in error.errors():
        name = ".".join(map(str, found["loc"][1:]))[:80]
        if found["type"] == "extra_forbidden":
            details.append(f"{name}: there is no such parameter")
        else:
            details.append(f"{name}: {found['msg']}, got {str(found['input'])[:80]!r}")
    return _problem(request, STATUS[errors.InvalidParameter], "; ".join(details))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return _problem(request, Kind(error.status_code, code), str(error.detail), headers)


def _methods(request: Request) -> set[str]:
    """What this path answers, of all routes that it fits; the router speaks of the first alone."""
    app: FastAPI = request.app
    every = (each.original_route for each in iter_route_contexts(app.routes))
    fits = (route for route in every if route.matches(request.scope)[0] is not Match.NONE)
    found = {method for route in fits for method in getattr(route, "methods", None) or ()}
    return found | {"HEAD"} if "GET" in found else found


async def _bug(request: Request, error: Exception) -> Response:
    found_by = request_id(request)
    model = str(request.scope.get("state", {}).get("model", ""))
    facts = {"request_id": found_by, "model": model}
    log.error("unexpected error, request=%s model=%s", found_by, quote(model), exc_info=error, extra={"facts": facts})
    # starlette answers from outside `Access`, which sets this header on everything else
    headers = {"X-Request-Id": found_by}
    return _problem(request, BUG, "an unexpected error: the log has it under this request_id", headers)


def install(app: FastAPI) -> None:
    """Makes every error of the app a problem+json."""
    app.add_exception_handler(errors.ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid_query)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
