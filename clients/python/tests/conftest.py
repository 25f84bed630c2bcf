"""The fixtures of the service's own tests: these run against a real one. And VAEs of diffusers, there and here."""

import asyncio
import time

import pytest

from latentd_client import AsyncClient, Client
from tests.conftest import _no_settings, anyio_backend, models
from tests.service import listening

__all__ = ["_no_settings", "anyio_backend", "models"]


@pytest.fixture(params=["blocking", "async"])
def do(request):
    """do(url, method, *arguments, client={...}, **keywords), in one of the shells."""

    def blocking(url, method, *args, client=None, **kwargs):
        with Client(url, **(client or {})) as shell:
            found = getattr(shell, method)(*args, **kwargs)
            return list(found) if method.endswith("many") else found

    async def awaited(url, method, *args, client=None, **kwargs):
        async with AsyncClient(url, **(client or {})) as shell:
            found = getattr(shell, method)(*args, **kwargs)
            return [each async for each in found] if method.endswith("many") else await found

    return blocking if request.param == "blocking" else lambda *args, **kw: asyncio.run(awaited(*args, **kw))


@pytest.fixture(scope="session")
def local():
    """{family: autoencoder of diffusers}."""
    from clients.python.tests.vaes import CHANNELS, autoencoder

    return {family: autoencoder(family) for family in CHANNELS}


@pytest.fixture(scope="session")
def url(tmp_path_factory, local):
    """A service that has the same under `FAMILY-tiny`."""
    folder = tmp_path_factory.mktemp("vaes")
    for family, vae in local.items():
        vae.save_pretrained(folder / "VAE" / f"{family}-tiny")
    with listening(folder) as (server, port):
        while not server.engine.ready:  # twelve models are not always read before it serves
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
