import logging
import re

import pytest

from tests.api.test_health import LIVE, READY
from tests.service import picture, serving


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl") as service:
        yield service


@pytest.mark.parametrize("given", ["a", "0-9:x/y=z+_.", "x" * 128])
async def test_a_request_id_is_echoed(service, given):
    assert (await service.get("/healthz/live", headers={"X-Request-Id": given})).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", 'a"b', "<script>", "ä"])
async def test_one_that_is_not_safe_is_replaced(service, given):
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    answer = await service.get("/models", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])
    assert len(answer.headers.get_list("X-Request-Id")) == 1
    for operation in (each for path in service.app.openapi()["paths"].values() for each in path.values()):
        told = [each["schema"] for each in operation.get("parameters", []) if each["name"] == "X-Request-Id"]
        assert told in ([], [{"type": "string"}])  # none is refused, so the document may forbid none


async def test_the_log_has_one_line_a_request(service, caplog):
    with caplog.at_level(logging.INFO, "app.access"):
        await service.post("/encode", content=picture(), headers={"X-Request-Id": "me"})
        await service.get("/no%0Asuch%20route")
    first, second = (record for record in caplog.records if record.name == "app.access")
    facts = first.__dict__["facts"]
    assert facts["ms"] > 0
    assert {key: facts[key] for key in ("method", "path", "status", "model", "request_id")} == {
        "method": "POST",
        "path": "/encode",
        "status": 200,
        "model": "kl",
        "request_id": "me",
    }
    assert re.fullmatch(r"POST /encode 200 [0-9.]+ ms request=me model=kl", first.getMessage())
    assert second.getMessage().startswith("GET /no%0Asuch%20route 404 ")


def lines(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "app.access"]


async def test_the_line_of_an_error_says_what_and_why_and_who(service, caplog):
    with caplog.at_level(logging.INFO, "app.access"):
        answer = await service.post("/encode", content=b"no picture", headers={"X-Request-Id": "me"})
        await service.post("/encode?model=no%0Abody%1b")
        await service.post("/encode?model=" + "x" * 513)
    first, second, third = lines(caplog)
    code, reason = answer.json()["code"], answer.json()["detail"]
    assert first.getMessage().endswith(f" ms request=me model=kl {code}: {reason}")
    facts = first.__dict__["facts"]
    assert (facts["code"], facts["reason"], facts["model"], facts["request_id"]) == (code, reason, "kl", "me")
    for record in (second, third):
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 800
    assert "unknown_model" in second.getMessage()
    assert "invalid_parameter: model: " in third.getMessage()


async def test_the_line_of_a_bug_has_the_code_too(service, caplog, monkeypatch):
    def broken(_):
        raise ZeroDivisionError

    monkeypatch.setattr("app.api.routes.pixels_header", broken)
    with caplog.at_level(logging.INFO):
        await service.post("/encode", content=picture(), headers={"X-Request-Id": "me"})
    (record,) = lines(caplog)
    assert record.levelno == logging.WARNING
    assert " 500 " in record.getMessage()
    assert "request=me model=kl internal_error: " in record.getMessage()
    (bug,) = (record for record in caplog.records if record.exc_info)
    assert bug.getMessage() == "unexpected error, request=me model=kl"


@pytest.mark.parametrize("path", [*LIVE, *READY, "/healthz/startup", "/metrics"])
async def test_probes_are_not_logged(service, caplog, path):
    with caplog.at_level(logging.INFO):
        assert (await service.get(path)).status_code == 200
    assert not lines(caplog)
    with caplog.at_level(logging.DEBUG, "app.access"):
        await service.get(path)
    assert len(lines(caplog)) == 1
