"""The service that a command uses: one at an address, or the same app inside this process; and how it is asked."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from app.api.schemas import Model, Models, Problem
from app.errors import InvalidInput, ServiceError
from app.main import create_app
from app.settings import Settings
from app.text import reason

AGAIN = 5  # times that a request is repeated after a 429 or 503
LONGEST = 60.0  # seconds that a Retry-After may make us wait
CONNECTIONS = 64  # to a service at an address
ANSWER_BYTES = 64 << 20
"""Of an answer, unless more can be meant. A sheet of 64 models has 50 MiB at most."""
PIXEL_BYTES = 16
"""Of an answer for each pixel that goes or comes: four channels of 16 bits are 8, and latents are less."""
UNIX = "unix:"  # an address that is the path of a socket

NOT_NOW = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
SYSTEMIC = frozenset({"unauthorized", "forbidden", "unknown_model", "unsupported_checkpoint", "unavailable"})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class Refused(ServiceError):
    """The service's answer was no; `code` says which, as in its problem+json."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


@asynccontextmanager
async def connect(url: str | None, key: str | None, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service at `url`, or else of one inside this process. Raises InvalidInput for no address."""
    if url is not None:
        headers = {b"Accept-Encoding": b"identity"}
        if key:
            headers[b"Authorization"] = b"Bearer " + key.encode(errors="surrogateescape")
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        try:
            path = url.removeprefix(UNIX) if url.startswith(UNIX) else None
            transport = httpx.AsyncHTTPTransport(uds=path, limits=limits) if path else None
            base = "http://latentd" if path else url
            remote = httpx.AsyncClient(base_url=base, headers=headers, timeout=None, limits=limits, transport=transport)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise InvalidInput(f"cannot use {url} as the service's address: {error}") from None
        async with remote as client:
            yield client
        return
    app = create_app(settings.model_copy(update=UNGUARDED))
    inside = _Inside(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=inside, base_url="http://latentd", timeout=None) as client,
    ):
        await app.state.context.engine.first_scan()  # however large the folder
        yield client


class _Inside(httpx.ASGITransport):
    """Takes an answer that is cut off for what it is, as a connection would."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.RemoteProtocolError for an answer without its end."""
        try:
            return await super().handle_async_request(request)
        except AssertionError as error:
            raise httpx.RemoteProtocolError("the answer was cut off: see the log") from error


UNGUARDED = {"api_keys": None, "api_keys_file": None, "admin_key_file": None}
"""Of a service in this process: nobody else reaches it, and key files may not be this user's to read."""


async def model_of(client: httpx.AsyncClient, model: str | None) -> Model:
    """The row of the model that a request would mean, before one is sent.

    Raises InvalidInput where several could be meant, Refused for one that is not there or cannot be used, or where
    the service refuses, and httpx.HTTPError.
    """
    if model is None:
        models = await _models(client)
        names = ", ".join(row.name for row in models.models if row.error is None)
        if models.default is None:
            raise InvalidInput(f"--model is required: there are {names}" if names else "there is no usable model")
        model = models.default
    content = content_of(await ask(client, "GET", f"/models/{quote(model)}"), "application/json")
    try:
        row = Model.model_validate_json(content)
    except ValidationError:
        raise ServiceError(f"{client.base_url} tells of no model as latentd does") from None
    if row.error is not None:
        raise Refused(f"model {row.name}: {row.error}", "unsupported_checkpoint")
    return row


def list_models(url: str | None, key: str | None, settings: Settings) -> list[dict[str, Any]]:
    """The rows of a service's GET /models. Raises ServiceError."""

    async def ask() -> Models:
        async with connect(url, key, settings) as client:
            return await _models(client)

    try:
        return asyncio.run(ask()).model_dump(mode="json")["models"]  # type: ignore[no-any-return]
    except httpx.HTTPError as error:
        raise ServiceError(f"{url}: {reason(error)}") from error


async def _models(client: httpx.AsyncClient) -> Models:
    content = content_of(await ask(client, "GET", "/models"), "application/json")
    try:
        return Models.model_validate_json(content)
    except ValidationError:
        raise ServiceError(f"{client.base_url} lists no models as latentd does") from None


async def ask(
    client: httpx.AsyncClient, method: str, path: str, most: int = ANSWER_BYTES, **request: Any
) -> httpx.Response:
    """An answer, read to its end. Raises ServiceError for more than `most` bytes, and httpx.HTTPError."""
    parts, size = [], 0
    async with client.stream(method, path, **request) as response:
        if packed := response.headers.get("content-encoding"):  # a few bytes of it may become any number
            raise ServiceError(f"an answer in {packed}, which was not asked for")
        async for data in response.aiter_bytes():
            size += len(data)
            if size > most:
                raise ServiceError(f"an answer of more than {most} bytes, which is the most that is read")
            parts.append(data)
    return httpx.Response(response.status_code, headers=response.headers, content=b"".join(parts))


async def post(client: httpx.AsyncClient, path: str, **request: Any) -> httpx.Response:
    """As `ask`; where there is no room now, asked for again when the service says, at most AGAIN times."""
    response = await ask(client, "POST", path, **request)
    for _ in range(AGAIN):
        if response.status_code not in NOT_NOW:
            break
        await asyncio.sleep(_seconds(response.headers.get("retry-after", "")))
        response = await ask(client, "POST", path, **request)
    return response


def _seconds(retry_after: str) -> float:
    """The header's seconds within bounds; a date, or nothing, is one second."""
    return min(float(retry_after), LONGEST) if retry_after.isascii() and retry_after.isdecimal() else 1.0


def content_of(response: httpx.Response, media: str) -> bytes:
    """The content of an answer of this type. Raises Refused, with the service's own reason if it gave one."""
    came = response.headers.get("content-type", "")
    if came == "application/problem+json":
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceError(f"HTTP {response.status_code} without a reason that can be read") from error
        raise Refused(problem.detail, problem.code)
    if response.status_code != httpx.codes.OK or came != media:  # somebody else's service
        to = response.headers.get("location")  # not followed: a key is for one address
        raise ServiceError(f"expected {media}, got HTTP {response.status_code} {came if to is None else f'to {to}'}")
    return response.content


def systemic(error: BaseException) -> bool:
    """Whether the next file would fail by the same: no service, no key, no model, no room on the disk."""
    match error:
        case Refused():
            return error.code in SYSTEMIC
        case httpx.HTTPError():
            return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol)
        case OSError():
            return error.errno in FULL
    return False


def replace_file(target: Path, content: bytes) -> None:
    """Writes a file in one step; where that fails, nothing stays. Raises OSError, which names the target."""
    partial = target.with_name(f".{target.name}.part")  # --resume must never meet half a file
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        with suppress(OSError):  # moved, or never made
            partial.unlink()
