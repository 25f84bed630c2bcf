"""The core's side of the talk: what a call wants done, one step after the other, and when it is tried again.

A call is a generator. It yields a step, is sent what came of it, and returns its result. It does no I/O itself: the
shells do, one blocking, one on an event loop; and a test is a third.
"""

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from latentd_client.errors import DeadlineExceeded, LatentdError, Unreachable, error_of

T = TypeVar("T")

GRACE = 1.0
"""Seconds that the service's own word on a deadline may come late, before we hang up."""
CONNECT = 10.0  # seconds for a connection


@dataclass(frozen=True)
class Send:
    """A request. What comes of it is an httpx.Response that has been read, or Unreachable is thrown."""

    method: str
    path: str
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None
    timeout: httpx.Timeout = field(default_factory=lambda: limits(None))


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
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random


def exchange(policy: Policy, send: Send, media: frozenset[str], timeout: float | None) -> Steps[httpx.Response]:
    """An answer of one of these types. Raises LatentdError."""
    timeout = policy.timeout if timeout is None else timeout
    end = None if timeout is None else policy.clock() + timeout
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
    return Send(send.method, send.path, send.params, headers, send.content, limits(left))


def limits(left: float | None) -> httpx.Timeout:
    """The socket's patience for a call that has so many seconds left."""
    if left is None:
        return httpx.Timeout(None, connect=CONNECT)
    return httpx.Timeout(left + GRACE, connect=min(CONNECT, left))


def broken(error: httpx.RequestError) -> LatentdError:
    """What a failure of the connection is to the caller."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        return DeadlineExceeded(f"no answer in time: {reason}")
    never = isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.DecodingError)
    return Unreachable(reason, retryable=not never)
