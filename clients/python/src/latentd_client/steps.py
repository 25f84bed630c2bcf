"""The core's side of the talk: what a call wants done, one step after the other, and when it is tried again.

A call is a generator. It yields a step, is sent what came of it, and returns its result. It does no I/O itself: the
shells do, one blocking, one on an event loop; and a test is a third.
"""

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx

from latentd_client.errors import DeadlineExceeded, LatentdError, UnexpectedAnswer, Unreachable, error_of

T = TypeVar("T")

GRACE = 1.0
"""Seconds that the service's own word on a deadline may come late, before we hang up."""
CONNECT = 10.0  # seconds for a connection
ERROR_BYTES = 64 << 10
"""Of an answer that is none of the good ones; the rest is not read."""


@dataclass(frozen=True)
class Send:
    """A request. What comes of it is an httpx.Response that has been read, by `Body`, or Unreachable is thrown."""

    method: str
    path: str
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None
    timeout: httpx.Timeout = field(default_factory=lambda: limits(None))
    most: int = 2 << 30  # bytes of a good answer
    late: Callable[[], bool] = field(default=lambda: False, compare=False)  # whether the deadline has passed


@dataclass(frozen=True)
class Wait:
    """So many seconds in which nothing is done."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """A function that blocks: a file, a picture's codec. What comes of it is what it returns."""

    function: Callable[[], Any]


Step = Send | Wait | Work
Steps = Generator[Step, Any, T]


@dataclass(frozen=True)
class Policy:
    """How patient a client is."""

    timeout: float | None = None  # seconds for a call, its repetitions included; None: as long as it takes
    retries: int = 4  # times that a call is tried again
    first_wait: float = 0.5  # seconds, where the service says none; doubled each time, and varied
    longest_wait: float = 60.0  # a Retry-After beyond this is an error for the caller to see
    most: int = Send.most
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random


def exchange(policy: Policy, send: Send, media: frozenset[str], timeout: float | None) -> Steps[httpx.Response]:
    """An answer of one of these types. Raises LatentdError."""
    timeout = policy.timeout if timeout is None else timeout
    end = None if timeout is None else policy.clock() + timeout
    send = replace(send, most=policy.most, late=lambda: end is not None and policy.clock() > end + GRACE)
    tried = 0
    while True:
        left = None if end is None else end - policy.clock()
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"no answer within {timeout:g} s")
        error: LatentdError | None
        try:
            response: httpx.Response = yield _within(send, left)
            error = error_of(response, media)
        except Unreachable as broken:
            if end is not None and policy.clock() >= end:  # a connection that was not there in time
                raise DeadlineExceeded(f"no answer within {timeout:g} s: {broken}") from broken
            error = broken
        if error is None:
            return response
        wait = _wait(policy, error, tried)
        if wait is None or (end is not None and policy.clock() + wait >= end):  # by then it is too late
            raise error
        yield Wait(wait)
        tried += 1


def _wait(policy: Policy, error: LatentdError, tried: int) -> float | None:
    """Seconds until the next attempt; None where there is none."""
    if not error.retryable or tried >= policy.retries:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= policy.longest_wait else None
    # Varied, so that clients that were turned away together do not come back together.
    wait: float = min(policy.longest_wait, policy.first_wait * 2**tried)
    return wait * (0.5 + 0.5 * policy.random())


def _within(send: Send, left: float | None) -> Send:
    if left is None:
        return send
    headers = send.headers | {"X-Request-Timeout-Ms": str(max(1, int(left * 1000)))}
    return replace(send, headers=headers, timeout=limits(left))


def limits(left: float | None) -> httpx.Timeout:
    """The socket's patience for a call that has so many seconds left."""
    if left is None:
        return httpx.Timeout(None, connect=CONNECT)
    return httpx.Timeout(left + GRACE, connect=min(CONNECT, left))


class Body:
    """What a request is answered with, as its bytes come: no more of them than may, and not after the deadline."""

    def __init__(self, response: httpx.Response, send: Send) -> None:
        """Raises UnexpectedAnswer for what is packed: a few bytes of it may become any number."""
        if (packed := response.headers.get("content-encoding", "identity")) != "identity":
            raise UnexpectedAnswer(f"an answer in {packed}, which was not asked for", status=response.status_code)
        self._response, self._send = response, send
        self._good = response.status_code == httpx.codes.OK
        self._most = send.most if self._good else ERROR_BYTES
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> bool:
        """Whether more is wanted. Raises UnexpectedAnswer for an answer that is too long, and DeadlineExceeded."""
        if self._send.late():
            raise DeadlineExceeded("the answer did not end in time")
        self._parts.append(data)
        self._size += len(data)
        if self._size > self._most and self._good:
            raise UnexpectedAnswer(f"an answer of more than {self._most} bytes, which is the most that is read")
        return self._size <= self._most

    def whole(self) -> httpx.Response:
        """The answer with its content."""
        content = b"".join(self._parts)
        return httpx.Response(self._response.status_code, headers=self._response.headers, content=content)


def broken(error: httpx.RequestError) -> LatentdError:
    """What a failure of the connection is to the caller."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        return DeadlineExceeded(f"no answer in time: {reason}")
    never = isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.DecodingError)
    return Unreachable(reason, retryable=not never)
