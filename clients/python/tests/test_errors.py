"""The service's errors by their codes, and answers that are none of its own."""

import email.utils
import time

import httpx
import pytest

import latentd_client
from app.api.errors import STATUS
from latentd_client.errors import BY_CODE, LatentdError, UnexpectedAnswer, error_of, seconds

PNG = frozenset({"image/png"})


def test_every_code_of_the_service_has_a_class_that_is_exported():
    codes = {kind.code for kind in STATUS.values()} - {"client_gone"}  # which nobody is there to read
    assert set(BY_CODE) == codes
    for kind in BY_CODE.values():
        assert getattr(latentd_client, kind.__name__) is kind


def test_a_code_of_a_later_service_is_an_error_all_the_same():
    body = {"code": "too_blue", "detail": "too blue", "retryable": False, "request_id": "r"}
    error = error_of(httpx.Response(451, headers={"Content-Type": "application/problem+json"}, json=body), PNG)
    assert type(error) is LatentdError
    assert (error.code, error.status, str(error)) == ("too_blue", 451, "too blue")


@pytest.mark.parametrize(
    ("status", "came", "retryable"),
    [(200, "text/html", False), (502, "text/html", True), (302, "", False), (404, "application/problem+json", False)],
)
def test_somebody_else_s_answer_is_told_so(status, came, retryable):
    error = error_of(httpx.Response(status, headers={"Content-Type": came}, content=b"<html>"), PNG)
    assert type(error) is UnexpectedAnswer
    assert (error.status, error.retryable) == (status, retryable)
    assert "expected image/png" in str(error)


def test_a_type_may_have_parameters():
    response = httpx.Response(200, headers={"Content-Type": "application/json; charset=utf-8"}, content=b"{}")
    assert error_of(response, frozenset({"application/json"})) is None


def test_seconds_of_a_retry_after():
    assert [seconds(text) for text in ("7", " 7 ", None, "", "soon", "-1", "²")] == [7, 7, *[None] * 5]
    ahead = seconds(email.utils.formatdate(time.time() + 30, usegmt=True))
    assert ahead is not None
    assert 20 < ahead <= 30
    assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
