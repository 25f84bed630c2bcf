"""The fixtures of the service's own tests: these run against a real one. And VAEs of diffusers, there and here."""

import pytest

from tests.conftest import _no_settings, anyio_backend, models
from tests.service import listening

__all__ = ["_no_settings", "anyio_backend", "models"]


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
    with listening(folder) as (_, port):
        yield f"http://127.0.0.1:{port}"
