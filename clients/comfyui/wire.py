"""HTTP to a latentd service: requests that can be given up, and errors in the service's own words."""

import io
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import numpy as np

HOME = "http://127.0.0.1:8000"
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 0.1  # between two looks at whether the user has pressed Cancel
PATIENCE_SECONDS = 60.0  # a service that says "later" is asked again for this long
LIST_BYTES = 16 << 20  # of a list of models
PROBLEM_BYTES = 64 << 10
DETAIL_CHARACTERS = 1000
SLACK_BYTES = 4096  # the header of an .npy, generously
KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))  # a host that is gone is noticed
LATER = (429, 503)
NPY = "application/x-npy"

Told = TypeVar("Told")


class LatentdError(Exception):
    """What went wrong, for ComfyUI's window."""


@dataclass(frozen=True)
class Server:
    """Where a service is, and the key that it is given, if any."""

    url: str
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Model:
    """A row of GET /models, as far as it matters here: channels and pixels per position of raw latents; of pictures."""

    name: str
    family: str
    latent_channels: int
    spatial_factor: int
    pixel_channels: int = 3


def server_of(url: str, environ: Mapping[str, str]) -> Server:
    """The service at `url`, at LATENTD_URL where that is empty, or else on this machine.

    LATENTD_KEY is for the host of LATENTD_URL alone: `url` comes with a workflow, which may be anybody's and name
    any other.
    Raises LatentdError for what is no address, and for a key that no header can hold.
    """
    home = environ.get("LATENTD_URL", "").strip() or HOME
    chosen = url.strip() or home
    key = environ.get("LATENTD_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise LatentdError("LATENTD_KEY is no key: a header holds printable ASCII alone")
    known = _origin(chosen) == _origin(home)
    return Server(chosen.rstrip("/"), key if key and known else None)


def _origin(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise LatentdError(f"{url!r} is no address of a service: {error}") from None
    if parts.username or parts.password:
        raise LatentdError("an address is saved with the workflow: put the key into LATENTD_KEY instead")
    if (
        parts.scheme not in {"http", "https"}
        or not parts.hostname
        or parts.query
        or parts.fragment
        or not url.isascii()
    ):
        raise LatentdError(f"{url!r} is no address of a service: expected one like {HOME}")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)


def never() -> None:
    """Of a call that nobody gives up."""


def models(server: Server, check: Callable[[], None] = never) -> tuple[list[str], str | None]:
    """The models of a service that can be used, and the one that it means where none is named."""

    def read(answer: Any) -> tuple[list[str], str | None]:
        return [str(row["name"]) for row in answer["models"] if not row["error"]], answer["default"]

    return _told(server, "/models", read, check)


def model(server: Server, name: str, check: Callable[[], None]) -> Model:
    """What the service says of a model; LatentdError where it cannot be used."""

    def read(row: Any) -> Model:
        if row["error"]:
            raise LatentdError(f"latentd at {server.url} cannot use {name!r}: {row['error']}")
        sizes = (int(row["latent_channels"]), int(row["spatial_factor"]), int(row.get("pixel_channels") or 3))
        return Model(str(row["name"]), str(row["family"]), *sizes)

    return _told(server, f"/models/{quote(name)}", read, check)


def _told(server: Server, path: str, read: Callable[[Any], Told], check: Callable[[], None]) -> Told:
    answer = call(server, "GET", path, most=LIST_BYTES, check=check)
    try:
        return read(json.loads(answer))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LatentdError(f"what answers at {server.url} is not latentd, or is older than these nodes") from None


def send_array(
    server: Server,
    path: str,
    query: Mapping[str, str],
    array: np.ndarray,
    dtype: str,
    shape: tuple[int, ...],
    check: Callable[[], None],
) -> np.ndarray:
    """POSTs an array and returns the one that comes back, which must be of this dtype and shape."""
    body = io.BytesIO()
    np.save(body, np.ascontiguousarray(array), allow_pickle=False)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    target = f"{path}?{urlencode(query)}"
    answer = call(server, "POST", target, body.getvalue(), NPY, most=size + SLACK_BYTES, check=check)
    header = _HEADER.match(answer)
    if header is None:
        raise LatentdError(f"latentd at {server.url} sent no array: {answer[:80]!r}")
    kind, sides = (part.decode() for part in header.groups())
    expected = np.dtype(dtype).str, ", ".join(map(str, shape))
    if (kind, sides.strip(" ,")) != expected:
        raise LatentdError(f"latentd at {server.url} sent {kind} ({sides}) where {dtype} {shape} was expected")
    if len(answer) - header.end() != size:
        raise LatentdError(f"latentd at {server.url} sent no array: {len(answer) - header.end()} bytes of {size}")
    return np.frombuffer(answer, dtype, offset=header.end()).reshape(shape).copy()


_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<]\w{2,8})', 'fortran_order': False, 'shape': \(([\d, ]{1,80})\), \} *\n",
    re.DOTALL,
)
"""The beginning of an .npy as the service writes it; numpy's own reader takes any literal of Python for one."""


def call(
    server: Server,
    method: str,
    path: str,
    body: bytes | None = None,
    accept: str = "application/json",
    *,
    most: int,
    check: Callable[[], None] = never,
) -> bytes:
    """The body of the answer, of at most so many bytes.

    `check` is called again and again while the service is waited for; when it raises, the connection is dropped and
    the service gives the work up. A service that is full or starting is asked again for a minute.
    Raises LatentdError for everything else that is not an answer.
    """
    headers = {"Accept": accept, "Content-Type": "application/octet-stream", "User-Agent": "latentd-comfyui"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        status, answer_headers, answer = _exchange(server, method, path, body, headers, most, check)
        if status == 200:
            return answer
        delay = answer_headers.get("retry-after", "")
        if status not in LATER or not delay.isdecimal() or time.monotonic() + float(delay) > end:
            to = answer_headers.get("location")  # not followed: the key is for one host
            words = f"moved to {to}" if to else _detail(server, status, answer)
            raise LatentdError(f"latentd at {server.url}: {words}"[:DETAIL_CHARACTERS])
        _rest(max(1.0, float(delay)), check)


def _rest(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, LOOK_SECONDS))


def _detail(server: Server, status: int, answer: bytes) -> str:
    """One line of a problem+json, or of what a proxy says in its place."""
    try:
        problem = json.loads(answer)
        text = f"{problem['detail']} ({status} {problem['code']}, request {problem['request_id']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f"status {status}, {answer[:200].decode(errors='replace')!r}"
    if status in {401, 403}:
        text += (
            "; the key is taken from LATENTD_KEY"
            if server.key
            else "; none was sent: LATENTD_KEY is for LATENTD_URL alone"
        )
    return " ".join(text.split())[:DETAIL_CHARACTERS]


@dataclass
class _Line:
    """A connection that another thread may hang up."""

    http: HTTPConnection
    up: bool = True
    end: socket.socket | None = None  # ours, of the connection

    def connect(self) -> None:
        self.http.connect()
        end = self.end = self.http.sock
        end.settimeout(None)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if (option := getattr(socket, name, None)) is not None:
                end.setsockopt(socket.IPPROTO_TCP, option, value)

    def hang_up(self) -> None:
        self.up = False
        if self.end is not None:
            with suppress(OSError):
                self.end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it


Answer = tuple[int, dict[str, str], bytes]


def _exchange(
    server: Server,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
    most: int,
    check: Callable[[], None],
) -> Answer:
    """One request in a thread of its own, while this one looks at `check`."""
    scheme, host, port = _origin(server.url)
    kind = HTTPSConnection if scheme == "https" else HTTPConnection
    line = _Line(kind(host, port, timeout=CONNECT_SECONDS))
    target = urlsplit(server.url).path.rstrip("/") + path
    pool = ThreadPoolExecutor(1, "latentd")
    future = pool.submit(_talk, line, method, target, body, headers, most)
    try:
        while not wait([future], LOOK_SECONDS).done:
            check()
        return future.result()
    except _TooMuch:
        raise LatentdError(f"latentd at {server.url} sent more than the {most} bytes that were expected") from None
    except HTTPException as error:
        raise LatentdError(f"what answers at {server.url} broke off or is not HTTP: {error!r}") from None
    except (OSError, UnicodeError) as error:  # the latter of a host's name that cannot be one
        raise LatentdError(f"latentd at {server.url} cannot be reached: {error}") from None
    finally:
        line.hang_up()
        pool.shutdown(wait=False)


class _TooMuch(Exception):
    """An answer is longer than it can be."""


def _talk(line: _Line, method: str, target: str, body: bytes | None, headers: Mapping[str, str], most: int) -> Answer:
    with closing(line.http) as http:
        line.connect()
        if not line.up:  # given up while it connected
            return 0, {}, b""
        # A service that refuses by the headers alone answers before it has read the body.
        with suppress(BrokenPipeError, ConnectionResetError):
            http.request(method, target, body, dict(headers))
        answer = http.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, _read(answer, most)


def _read(answer: HTTPResponse, most: int) -> bytes:
    if answer.status != 200:
        return answer.read(PROBLEM_BYTES)
    got = answer.read(most + 1)
    if len(got) > most:
        raise _TooMuch
    return got
