from base64 import b64encode
from itertools import product

import pytest
from fastapi.routing import APIRoute

from app.api.context import Limits
from app.api.errors import REMOTE
from app.errors import TooLarge
from tests.service import array_of, picture, refused, serving

HEALTH = {
    *("/healthz/live", "/healthz/ready", "/healthz/startup", "/health", "/livez", "/readyz"),
    *("/v2/health/live", "/v2/health/ready"),
}
PAGE = {"/", "/page/kl"}


def basic(text: str) -> str:
    return f"Basic {b64encode(text.encode()).decode()}"


@pytest.fixture(scope="module")
async def service(models):
    keys = "first, zweiter-schlüssel"
    async with serving(models, default_model="kl", api_keys=keys, admin_key="root", metrics_public=False) as service:
        yield service


def routes(app) -> list[tuple[str, str]]:
    """Every (method, path), with a name where a path needs one."""
    mine = [route for included in app.routes for route in included.original_router.routes]
    return [
        (method, route.path_format.replace("{name}", "kl"))
        for route in mine
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]


async def test_every_route_but_health_and_the_page_is_guarded(service):
    seen = routes(service.app)
    assert {(method, path) for method, path in seen if path in PAGE} == set(product(("GET", "HEAD"), PAGE))
    assert {path for _, path in seen} >= HEALTH | {"/encode", "/models", "/models/kl/load", "/docs", "/openapi.json"}
    for method, path in seen:
        answer = await service.request(method, path)
        if path in HEALTH:
            assert answer.status_code == 200
            continue
        if path in PAGE:  # files that hold no secret: see test_page.py
            assert answer.status_code == (200 if path == "/" else 404)
            continue
        wrong = await service.request(method, path, headers={"Authorization": "Bearer wrong"})
        if path.startswith(REMOTE):  # errors of another form: see test_remote
            assert (answer.status_code, wrong.status_code) == (401, 403)
        else:
            refused(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == 'Bearer, Basic realm="latentd"'
            refused(wrong, 403, "forbidden")


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer first",
        "bearer  first ",
        "Bearer zweiter-schlüssel",
        "Bearer root",
        basic("first:first"),
        basic(":first"),
        basic("user:zweiter-schlüssel"),
    ],
)
async def test_a_key_opens(service, authorization):
    headers = {"Authorization": authorization.encode()}
    array_of(await service.post("/encode", content=picture(), headers=headers))
    for path in ("/models", "/metrics", "/docs", "/openapi.json"):
        assert (await service.get(path, headers=headers)).status_code == 200


NEARLY = [
    "Bearer",
    basic("first"),
    "Bearer firs",
    "Bearer first1",
    "Bearer first first",
    "Bearer FIRST",
    basic("x:first1"),
]


@pytest.mark.parametrize("authorization", ["", "first", "Digest first", "Basic first", "Basic é", "Basic !", *NEARLY])
async def test_what_is_no_key_is_401_or_403(service, authorization):
    answer = await service.get("/models", headers={"Authorization": authorization.encode("latin-1")})
    assert answer.status_code == (403 if authorization in NEARLY else 401)
    refused(answer, answer.status_code, "forbidden" if answer.status_code == 403 else "unauthorized")


async def test_the_key_is_looked_at_before_the_body(service):
    refused(await service.post("/encode?unknown=1", content=b"no picture"), 401, "unauthorized")


async def test_admin_routes_want_the_admin_key(service):
    for what in ("load", "pin", "unload", "unpin"):
        path = f"/models/tiny/{what}"
        refused(await service.post(path), 401, "unauthorized")
        refused(await service.post(path, headers={"Authorization": "Bearer first"}), 403, "forbidden")
        for authorization in ("Bearer root", basic("admin:root")):
            answer = await service.post(path, headers={"Authorization": authorization})
            assert answer.status_code == (409 if what == "unload" else 200), answer.text


async def test_without_keys_the_service_is_open_and_its_admin_routes_are_shut(models):
    async with serving(models) as service:
        assert (await service.get("/models")).status_code == 200
        assert (await service.get("/metrics")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer root"}):
            for what in ("load", "unload", "pin", "unpin"):
                answer = await service.post(f"/models/kl/{what}", headers=headers)
                assert "LATENTD_ADMIN_KEY" in refused(answer, 403, "forbidden")


async def test_metrics_are_public_unless_they_are_not(models):
    async with serving(models, api_keys="first") as service:
        assert (await service.get("/metrics")).status_code == 200


def test_no_route_is_fastapis_own(service):
    assert all(hasattr(route, "original_router") for route in service.app.routes)


def test_claims_are_checked_as_numbers():
    limits = Limits(body_bytes=1, picture_pixels=100, items=4, pixels=150)
    limits.check([(10, 10)], times=1)
    for size, times, match in [
        ((10, 11), 1, "10x11"),
        ((1, 1), 10**15, f"{10**15} pictures"),
        ((10, 10), 2, "200 pixels"),
    ]:
        with pytest.raises(TooLarge, match=match):
            limits.check([size], times)
