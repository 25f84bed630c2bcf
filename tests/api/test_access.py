import logging
import re

import pytest

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
    assert second.getMessage().startswith("GET /no%0Asuch%20route 404 ")
