"""Around every request, what its bytes may cost: refused early, sent in pieces, counted until they are gone.

Pure ASGI, inside `Access`. It also makes every GET route answer HEAD.
"""

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.door.room import Held, Room
from app.api.errors import problem
from app.errors import InvalidParameter, MalformedBody, ServiceError, Unavailable

PROBES = frozenset(
    {
        *("/healthz/live", "/healthz/ready", "/healthz/startup", "/health", "/livez", "/readyz"),
        *("/v2/health/live", "/v2/health/ready"),
    }
)
"""Answered however crowded it is. Nothing that they depend on may wait for a thread."""

MAX_PARAMETERS = 64
MAX_QUERY = 32_768
"""Bytes: room for every character of the longest list of models as escapes of UTF-8."""

PIECE = 1 << 16
"""Bytes of an answer that are handed over at once; the next wait until the client has taken most of these."""


class Bounds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, room: Room) -> None:
        self.app = app
        self.room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or passes other scopes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if error := _refusal(scope):
            await problem(Request(scope), error, {"Connection": "close"})(
                scope, receive, send
            )  # whatever else it sends
            return
        head = scope["state"]["head"] = scope["method"] == "HEAD"
        held = scope["state"]["held"] = Held(self.room)

        async def answer(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            body = b"" if head else message.get("body", b"")
            held.add(len(body))
            for start in range(0, len(body) - PIECE, PIECE):
                await send({**message, "body": body[start : start + PIECE], "more_body": True})
            last = len(body) and (len(body) - 1) // PIECE * PIECE
            await send({**message, "body": body[last:]})
            held.give_back(len(body))  # an answer may have no end

        try:
            await self.app({**scope, "method": "GET"} if head else scope, receive, answer)
        finally:
            held.give_back()


def _refusal(scope: Scope) -> ServiceError | None:
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        # Whoever stands before this service may believe the other one, and see another request behind this one.
        return MalformedBody("a request has Transfer-Encoding or Content-Length, not both")
    if scope["path"] in PROBES:
        return None
    if scope["state"].get("crowded"):
        return Unavailable("too many connections are open")
    query = scope["query_string"]
    if len(query) > MAX_QUERY or query.count(b"&") >= MAX_PARAMETERS:  # before anybody parses it
        return InvalidParameter(
            f"the query has {query.count(b'&') + 1} parameters in {len(query)} bytes; "
            f"at most {MAX_PARAMETERS} in {MAX_QUERY} are read"
        )
    return None
