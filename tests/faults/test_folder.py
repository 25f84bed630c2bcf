"""A models folder that loses files, has half of them, forbids and is full: while requests are under way."""

import asyncio
import errno
import shutil
import threading
from pathlib import Path

import pytest

from app.store import digests
from app.weights import files
from tests.service import array_of, latent, npy, refused, serving, until

NPY = {"Accept": "application/x-npy"}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """Each test's own, with one model."""
    shutil.copy(models / "VAE" / "kl.safetensors", tmp_path)
    return tmp_path


@pytest.fixture
async def service(folder):
    async with serving(folder, headers=NPY, admin_key="root") as service:
        yield service


def decode(service):
    return service.post("/decode?model=kl", content=npy(latent()))


async def listed(service, with_error):
    """The error of the model, once it has one, or has none any more."""
    async with asyncio.timeout(60):
        while True:
            (row,) = (await service.get("/models")).json()["models"]
            if bool(row["error"]) == with_error:
                return row["error"]
            await asyncio.sleep(0.05)


def at_rest(service):
    (worker,) = service.engine.workers
    held = [worker.batcher.items, worker.batcher.pixels, service.engine.open_requests]
    return held == [0] * 3 and not any(each.in_use for each in worker.cache.residents())


async def test_a_file_that_vanishes_before_it_is_loaded_is_unknown_and_known_again_once_it_is_back(
    service, folder, models
):
    place, go, loads = folder / "kl.safetensors", threading.Event(), threading.Event()
    (worker,) = service.engine.workers
    real = worker._load_module

    def load(*given):
        loads.set()
        assert go.wait(60)
        return real(*given)

    worker._load_module = load
    waiting = [asyncio.ensure_future(decode(service)) for _ in range(3)]
    await until(loads.is_set)
    place.unlink()
    go.set()
    for answer in waiting:
        refused(await answer, 404, "unknown_model")
    refused(await decode(service), 404, "unknown_model")
    assert at_rest(service)
    shutil.copy(models / "VAE" / "kl.safetensors", place)
    assert array_of(await decode(service)).shape == (1, 32, 32, 3)


async def test_half_a_file_is_an_error_of_its_model_and_never_half_a_network(service, folder):
    place = folder / "kl.safetensors"
    sound = place.read_bytes()
    expected = array_of(await decode(service))
    for keep in (len(sound) // 2, len(sound) - 1, 1000, 8, 0):
        place.write_bytes(sound[:keep])
        answer = await decode(service)
        assert answer.status_code in (200, 404, 422)
        if answer.status_code == 200:  # with the weights that are there, for as long as it may still be written
            assert (array_of(answer) == expected).all()
        assert "\n" not in await listed(service, with_error=True)
        answer = await decode(service)
        refused(answer, 422, answer.json()["code"])
    place.write_bytes(sound)
    await listed(service, with_error=False)
    assert (array_of(await decode(service)) == expected).all()
    assert at_rest(service)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
async def test_a_file_that_cannot_be_read_is_said_and_read_once_it_can(folder, monkeypatch, error):
    real = files.open_regular

    def forbidden(path):
        if path.suffix == ".safetensors":
            raise error
        return real(path)

    async with serving(folder, headers=NPY) as service:
        expected = array_of(await decode(service))
    async with serving(folder, headers=NPY) as service:  # anew: listed by what is remembered of it, and not loaded yet
        monkeypatch.setattr(files, "open_regular", forbidden)
        answer = await decode(service)
        assert answer.status_code in (404, 422, 500, 503), answer.text
        assert error.strerror in refused(answer, answer.status_code, answer.json()["code"])
        assert str(folder) not in answer.text
        monkeypatch.setattr(files, "open_regular", real)
        (folder / "kl.safetensors").touch()
        assert (array_of(await decode(service)) == expected).all()
        assert service.count("vae_batch_item_failures_total", reason="lost") == 0
        assert at_rest(service)


async def test_a_folder_without_room_for_what_is_remembered_serves_all_the_same(folder, monkeypatch):
    real = Path.write_text

    def full(path, *given):
        if path.name.startswith(digests.CACHE):
            real(path, "half")  # of it was written
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *given)

    monkeypatch.setattr(Path, "write_text", full)
    for _ in range(2):
        async with serving(folder, headers=NPY) as service:
            array_of(await decode(service))
    assert [each.name for each in folder.iterdir()] == ["kl.safetensors"]
