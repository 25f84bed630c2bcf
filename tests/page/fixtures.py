"""A browser and a service for a whole session, and for each test a fresh visitor."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser

from app.server import Server
from tests.page.visit import Visit, browsing, chromium, fill, visiting
from tests.service import listening


class Running(NamedTuple):
    """A service that listens."""

    server: Server
    base: str


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("no chromium here")
    with browsing() as found:
        yield found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("page") / "models")
    (folder / "VAE" / "<b>broken<b>.safetensors").write_bytes(b"not a model")
    return folder


@pytest.fixture(scope="session")
def running(folder: Path) -> Iterator[Running]:
    with listening(folder, admin_key="the-admin") as (server, port):
        yield Running(server, f"http://127.0.0.1:{port}")


@pytest.fixture
def visit(browser: Browser, running: Running) -> Iterator[Visit]:
    with visiting(browser, running.base) as visit:
        yield visit
