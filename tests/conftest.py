"""Fixtures of every test: a folder of small random models, and an environment without settings."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.store.weights import state_of


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection needs to walk through torch and diffusers again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for fixtures of any scope."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LATENTD_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_log_left() -> Iterator[None]:
    """A command that a test runs leaves no log level, and no handler, whose stream is closed by the next test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, `kl` (sd1 by default, with a posterior) and `tiny` (taesd); not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "VAE").mkdir()
    save_file(state_of("sd1"), folder / "VAE" / "kl.safetensors")
    save_file(state_of("taesd"), folder / "VAE" / "tiny.safetensors")
    return folder


@pytest.fixture(scope="session")
def rgba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of pictures with alpha, `layered` (wan21); not to be written to."""
    folder = tmp_path_factory.mktemp("rgba")
    (folder / "VAE").mkdir()
    save_file(state_of("wan21", pixel_channels=4), folder / "VAE" / "layered.safetensors")
    return folder
