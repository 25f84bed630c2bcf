import logging
from http import HTTPStatus

import pytest
import torch
from safetensors.torch import save_file

import app.api.door.body  # noqa: F401  every module that defines an error
from app import errors
from app.api.errors import LONGEST, STATUS, kind_of
from tests.service import latent, npy, picture, refused, serving
from tests.store.weights import state_of


def tree(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
    return {kind}.union(*(tree(below) for below in kind.__subclasses__()))


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl") as service:
        yield service


def test_every_error_has_a_row():
    raised = {each for each in tree(errors.ServiceError) if not each.__module__.startswith("app.tools.")}  # by no route
    assert raised == set(STATUS)


def test_the_statuses_are_those_of_the_interface():
    assert {kind.status for kind in STATUS.values()} == {
        *(400, 401, 403, 404, 406, 408, 409, 413, 415, 422, 429, 499, 500, 503, 504, 507)
    }
    assert {kind.status for kind in STATUS.values() if kind.retryable} == {408, 409, 429, 503, 504}
    codes = [kind.code for kind in STATUS.values()]
    assert len(set(codes)) == len(codes)


def test_an_error_without_a_row_takes_that_of_its_parent():
    class Odd(errors.InvalidLatent):
        """Only here."""

    assert kind_of(Odd("x")) is STATUS[errors.InvalidLatent]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/nothing%0d%0ahere", 404),
        ("POST", "/remote", 404),
        ("GET", "/encode", 405),
        ("OPTIONS", "/decode", 405),
        ("PUT", "/models", 405),
        ("PATCH", "/models/kl", 405),
        ("POST", "/healthz/live", 405),
    ],
)
async def test_routes_that_are_not_there_are_problems_too(service, method, path, status):
    answer = await service.request(method, path)
    refused(answer, status, HTTPStatus(status).phrase.lower().replace(" ", "_"))
    assert answer.json()["title"] == HTTPStatus(status).phrase
    assert answer.json()["instance"].isprintable()
    if status == 405:
        assert answer.headers["Allow"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/models", "GET, HEAD"),
        ("/encode", "POST"),
        ("/models/kl", "DELETE, GET, HEAD, PUT"),  # of three routes
        ("/preview/stream", "GET, HEAD, POST"),
    ],
)
async def test_what_a_path_answers_is_told_of_all_its_routes(service, path, methods):
    answer = await service.request("PATCH", path)
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == methods


@pytest.mark.parametrize("path", ["/models/" + "%0a" * 5000, "/models?" + "é" * 3000 + "=1", "/" + "x" * 9000])
async def test_an_error_quotes_no_more_than_can_be_read(service, path):
    answer = await service.get(path)
    assert answer.status_code in (404, 422)
    assert all(len(str(value)) <= LONGEST for value in answer.json().values())
    assert len(answer.content) < 4 * LONGEST


async def test_a_problem_says_all_that_rfc_9457_asks(service):
    answer = await service.post("/encode?seed=x", content=picture(), headers={"X-Request-Id": "mine:1"})
    assert answer.json() == {
        "type": "urn:latentd:problem:invalid_parameter",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": answer.json()["detail"],
        "instance": "/encode",
        "code": "invalid_parameter",
        "request_id": "mine:1",
        "retryable": False,
    }
    assert "seed" in answer.json()["detail"]
    assert "'x'" in answer.json()["detail"]


async def test_a_bug_is_told_without_its_traceback_and_logged_with_it(service, monkeypatch, caplog):
    def broken(_):
        raise RuntimeError("secret of the house")

    monkeypatch.setattr("app.api.routes.pixels_header", broken)
    with caplog.at_level(logging.ERROR, "app.api"):
        answer = await service.post("/encode", content=picture(), headers={"X-Request-Id": "bug-1"})
    refused(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "secret of the house" in caplog.text
    assert "bug-1" in caplog.text
    monkeypatch.undo()
    assert (await service.post("/encode", content=picture())).status_code == 200
    assert service.count("vae_requests_total", op="encode", model="kl", status="500") == 1


async def test_a_bug_in_the_middleware_is_a_problem_as_well(service, monkeypatch):
    monkeypatch.setattr("app.api.door.access.uuid", None)
    answer = await service.get("/models")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == ""


@pytest.mark.parametrize("host", ["[", "a b", "[::1", "x:y:z", "", "\xff"])
async def test_a_host_that_is_none_breaks_nothing(service, host):
    refused(await service.get("/nothing", headers={"Host": host.encode("latin-1")}), 404, "not_found")


async def test_non_finite_output_is_a_500_of_its_own(models, tmp_path):
    state = state_of("sd1")
    state["decoder.conv_out.weight"] = torch.full_like(state["decoder.conv_out.weight"], torch.inf)
    save_file(state, tmp_path / "inf.safetensors")
    async with serving(tmp_path) as service:
        answer = await service.post("/decode", content=npy(latent()))
        assert "fp32" in refused(answer, 500, "non_finite_output")
