"""The route, with what it needs of ComfyUI's server and of aiohttp; `make comfyui` asks the real ones."""

import json
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.clients.comfyui.service import ok, telling


@pytest.fixture
def listing(monkeypatch):
    """The module, and the routes that it has added."""
    routes: dict[str, Any] = {}
    aiohttp, server = ModuleType("aiohttp"), ModuleType("server")
    aiohttp.web = SimpleNamespace(  # type: ignore[attr-defined]
        Request=object, Response=object, json_response=lambda body, status=200: (status, body)
    )
    table = SimpleNamespace(get=lambda path: lambda handler: routes.setdefault(path, handler))
    server.PromptServer = SimpleNamespace(instance=SimpleNamespace(routes=table))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    monkeypatch.setitem(sys.modules, "server", server)
    import_module("clients.comfyui.listing").add_route()
    yield routes["/latentd/models"]
    sys.modules.pop("clients.comfyui.listing")


async def test_names_of_the_service_at_the_url(listing):
    rows = [{"name": "a", "error": None}, {"name": "b", "error": "truncated"}]
    with telling(ok(json.dumps({"models": rows, "default": None}).encode())) as told:
        assert await listing(SimpleNamespace(query={"url": told.url})) == (200, {"models": ["a"]})


async def test_names_of_the_environments_service(listing, monkeypatch):
    with telling(ok(b'{"models": [], "default": null}')) as told:
        monkeypatch.setenv("LATENTD_URL", told.url)
        assert await listing(SimpleNamespace(query={})) == (200, {"models": []})


async def test_an_error_is_told(listing):
    status, body = await listing(SimpleNamespace(query={"url": "nowhere"}))
    assert status == 502
    assert "'nowhere' is no address" in body["error"]
