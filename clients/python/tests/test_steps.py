"""The core, driven by hand: what a call asks for, and when it asks again. No socket, no clock, no sleep."""

import httpx
import pytest

from latentd_client import (
    DeadlineExceeded,
    InvalidLatent,
    LatentdError,
    NonFiniteOutput,
    Overloaded,
    Unavailable,
    Unreachable,
)
from latentd_client.steps import CONNECT, GRACE, Policy, Send, Wait, broken, exchange, limits

NPY = frozenset({"application/x-npy"})
GOOD = httpx.Response(200, headers={"Content-Type": "application/x-npy"}, content=b"numbers")


def problem(status: int, code: str, *, retryable: bool = False, **headers: str) -> httpx.Response:
    body = {"code": code, "detail": f"it is {code}", "retryable": retryable, "request_id": "r-1"}
    return httpx.Response(status, headers={"Content-Type": "application/problem+json", **headers}, json=body)


BUSY = problem(429, "overloaded", retryable=True, **{"Retry-After": "3"})
DOWN = problem(503, "unavailable", retryable=True)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(answers, *, timeout=None, seconds=1.0, **policy):
    """Goes through an exchange, each answer after so many seconds; (result or error, steps)."""
    clock, left, steps = Clock(), list(answers), []
    call = exchange(Policy(clock=clock, random=lambda: 1.0, **policy), Send("POST", "/x"), NPY, timeout)
    try:
        step = next(call)
        while True:
            steps.append(step)
            if isinstance(step, Wait):
                clock.now += step.seconds
                step = call.send(None)
                continue
            clock.now += seconds
            answer = left.pop(0)
            step = call.throw(answer) if isinstance(answer, Exception) else call.send(answer)
    except StopIteration as done:
        return done.value, steps
    except LatentdError as error:
        return error, steps


def test_a_connection_that_was_not_there_in_time_is_a_deadline():
    error, _ = drive([Unreachable("ConnectTimeout")], timeout=1.0, seconds=1.0)
    assert isinstance(error, DeadlineExceeded)
    assert "ConnectTimeout" in str(error)


def waits(steps):
    return [step.seconds for step in steps if isinstance(step, Wait)]


def test_a_good_answer_is_the_end():
    result, (send,) = drive([GOOD])
    assert result is GOOD
    assert send == Send("POST", "/x")


def test_it_comes_back_when_the_service_says():
    result, steps = drive([BUSY, BUSY, GOOD])
    assert result is GOOD
    assert waits(steps) == [3.0, 3.0]


def test_a_retry_after_that_is_too_long_is_for_the_caller():
    error, steps = drive([BUSY], longest_wait=2.0)
    assert isinstance(error, Overloaded)
    assert (error.retry_after, error.status, error.code, error.request_id) == (3.0, 429, "overloaded", "r-1")
    assert len(steps) == 1


def test_without_a_retry_after_the_waits_double_up_to_a_bound():
    error, steps = drive([DOWN] * 9, retries=8, first_wait=0.5, longest_wait=10.0)
    assert isinstance(error, Unavailable)
    assert waits(steps) == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]


def test_waits_are_varied_down_to_a_half():
    call = exchange(Policy(random=lambda: 0.0), Send("POST", "/x"), NPY, None)
    next(call)
    assert call.send(DOWN) == Wait(0.25)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(problem(422, "invalid_latent"), InvalidLatent), (problem(500, "non_finite_output"), NonFiniteOutput)],
)
def test_what_would_fail_again_is_not_tried_again(answer, kind):
    error, steps = drive([answer])
    assert type(error) is kind
    assert str(error) == f"it is {kind.code}"
    assert len(steps) == 1


def test_a_connection_that_breaks_is_tried_again():
    result, steps = drive([Unreachable("refused", retryable=True), GOOD])
    assert result is GOOD
    assert waits(steps) == [0.5]
    error, steps = drive([Unreachable("no such scheme")])
    assert isinstance(error, Unreachable)
    assert len(steps) == 1


def test_only_so_often():
    error, steps = drive([BUSY] * 3, retries=2)
    assert isinstance(error, Overloaded)
    assert len(waits(steps)) == 2


def test_the_service_knows_how_much_patience_is_left():
    _, steps = drive([BUSY, GOOD], timeout=10.0)
    first, _, second = steps
    assert (first.headers["X-Request-Timeout-Ms"], second.headers["X-Request-Timeout-Ms"]) == ("10000", "6000")
    assert (first.timeout, second.timeout) == (limits(10.0), limits(6.0))


def test_a_wait_beyond_the_deadline_is_not_begun():
    error, steps = drive([BUSY], timeout=3.5)  # after 1 s, 3 s more
    assert isinstance(error, Overloaded)
    assert len(steps) == 1
    assert drive([BUSY, GOOD], timeout=4.5)[0] is GOOD


def test_after_the_deadline_nothing_is_sent():
    error, steps = drive([], timeout=0.0)
    assert isinstance(error, DeadlineExceeded)
    assert steps == []


def test_the_policy_s_timeout_is_that_of_calls_that_name_none():
    _, (send,) = drive([GOOD], timeout=None)
    assert "X-Request-Timeout-Ms" not in send.headers
    for said, sent in ((None, "2000"), (1.0, "1000")):
        send = next(exchange(Policy(timeout=2.0, clock=lambda: 0.0), Send("POST", "/x"), NPY, said))
        assert isinstance(send, Send)
        assert send.headers["X-Request-Timeout-Ms"] == sent


def test_the_socket_waits_a_little_longer_than_the_service():
    assert limits(5.0) == httpx.Timeout(5.0 + GRACE, connect=5.0)
    assert limits(50.0).connect == CONNECT
    assert (limits(None).read, limits(None).connect) == (None, CONNECT)


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (httpx.ConnectError("refused"), Unreachable, True),
        (httpx.ConnectTimeout(""), Unreachable, True),
        (httpx.RemoteProtocolError("hung up"), Unreachable, True),
        (httpx.UnsupportedProtocol("ftp"), Unreachable, False),
        (httpx.ReadTimeout(""), DeadlineExceeded, False),
    ],
)
def test_what_a_broken_connection_is(error, kind, retryable):
    found = broken(error)
    assert type(found) is kind
    assert found.retryable is retryable
    assert str(found)
