import asyncio
import errno
import hashlib
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from app.api import storing
from app.api.door import body
from app.store.incoming import HIDDEN, Incoming
from tests.service import array_of, latent, listening, npy, occupied, picture, refused, serving, until
from tests.store.weights import state_of

ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    (tmp_path / "VAE").mkdir()
    shutil.copy(models / "VAE" / "kl.safetensors", tmp_path / "VAE")
    return tmp_path


@pytest.fixture
async def service(folder):
    async with serving(folder, headers=ADMIN, admin_key="root") as service:
        yield service


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return save(state_of("taesd"))


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "VAE").iterdir() if path.name != ".latentd-hashes.json"}


async def in_pieces(content: bytes, size: int = 50_000):
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def names(service) -> set[str]:
    return {row["name"] for row in (await service.get("/models")).json()["models"]}


async def test_an_upload_is_a_model_at_once(service, folder, tiny):
    answer = await service.put("/models/new", content=in_pieces(tiny))
    assert answer.status_code == 201, answer.text
    row = answer.json()
    assert (row["name"], row["family"], row["path"]) == ("new", "taesd", str(folder / "VAE" / "new.safetensors"))
    assert row["sha256"] == hashlib.sha256(tiny).hexdigest()
    assert files(folder) == {"kl.safetensors", "new.safetensors"}
    assert (folder / "VAE" / "new.safetensors").read_bytes() == tiny
    array_of(await service.post("/encode?model=new", content=picture()))


async def test_a_suffix_is_the_content_s(service, folder, tmp_path):
    torch.save({"state_dict": state_of("taesd")}, tmp_path / "pickle")
    answer = await service.put("/models/new.vae.safetensors", content=(tmp_path / "pickle").read_bytes())
    assert (answer.status_code, answer.json()["name"]) == (201, "new.vae")
    assert "new.vae.ckpt" in files(folder)


async def test_what_is_no_vae_is_refused_with_its_reason_and_leaves_nothing(service, folder, tiny):
    for content in (b"", b"not a model", tiny[:-1], save({"weight": torch.zeros(3)})):
        refused(await service.put("/models/new", content=content), 422, "unsupported_checkpoint")
    assert files(folder) == {"kl.safetensors"}


async def test_what_came_otherwise_than_it_was_sent_is_refused(service, folder, tiny):
    digest = hashlib.sha256(tiny).hexdigest()
    detail = refused(await service.put(f"/models/new?sha256={'0' * 64}", content=tiny), 400, "malformed_body")
    assert digest in detail
    refused(await service.put("/models/new?sha256=abc", content=tiny), 422, "invalid_parameter")
    assert files(folder) == {"kl.safetensors"}
    assert (await service.put(f"/models/new?sha256={digest.upper()}", content=tiny)).status_code == 201


async def test_nothing_is_written_over_unless_it_is_asked_for(service, folder, tiny):
    before = (folder / "VAE" / "kl.safetensors").read_bytes()
    for name in ("kl", "KL", "kl.safetensors"):
        detail = refused(await service.put(f"/models/{name}", content=tiny), 409, "model_exists")
        assert "replace=true" in detail
    assert (folder / "VAE" / "kl.safetensors").read_bytes() == before
    array_of(await service.post("/encode", content=picture()))
    answer = await service.put("/models/kl?replace=true", content=tiny)
    assert (answer.status_code, answer.json()["family"]) == (201, "taesd")
    assert answer.json()["sha256"] == hashlib.sha256(tiny).hexdigest()
    served = await service.post("/encode", content=picture())
    assert served.headers["X-Model-SHA256"] == answer.json()["sha256"]


async def test_another_file_of_that_name_is_not_replaced(service, folder, tiny, tmp_path):
    torch.save(state_of("taesd"), tmp_path / "pickle")
    content = (tmp_path / "pickle").read_bytes()
    assert "delete it first" in refused(
        await service.put("/models/kl?replace=true", content=content), 409, "model_exists"
    )
    (folder / "VAE" / "sub").mkdir()
    (folder / "VAE" / "sub" / "deep.safetensors").write_bytes(tiny)
    await names(service)
    refused(await service.put("/models/deep?replace=true", content=tiny), 409, "model_exists")
    assert files(folder) == {"kl.safetensors", "sub"}


async def test_a_file_that_comes_by_itself_meanwhile_is_not_written_over(service, folder, tiny, monkeypatch):
    target, check = folder / "VAE" / "new.safetensors", service.engine.store.check

    def other(path):
        target.write_bytes(b"somebody else's")
        return check(path)

    monkeypatch.setattr(service.engine.store, "check", other)
    refused(await service.put("/models/new", content=tiny), 409, "model_exists")
    assert target.read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".hidden", "a%2Fb", "..%2F..%2Fetc%2Fpasswd", "a%00b", "a%09b", "a%5Cb", "%20a", "a%20", "c:d", "%7F"),
        *(".safetensors", "n" * 201, "a%2A", "a%FF"),
    ],
)
async def test_a_name_is_a_file_s(service, folder, name, tiny):
    answer = await service.put(f"/models/{name.replace('..', '%2E%2E')}", content=tiny)
    refused(answer, 422, "invalid_parameter")
    assert files(folder) == {"kl.safetensors"}
    assert not (folder.parent / "etc").exists()


async def test_only_so_many_bytes_are_taken_announced_or_not(folder, tiny):
    async with serving(folder, headers=ADMIN, admin_key="root", max_upload_bytes=len(tiny) - 1) as service:
        for content in (tiny, in_pieces(tiny)):
            detail = refused(await service.put("/models/new", content=content), 413, "too_large")
            assert "MAX_UPLOAD_BYTES" in detail
        assert files(folder) == {"kl.safetensors"}


async def test_a_body_may_be_larger_than_other_bodies_and_takes_no_room_of_theirs(folder, tiny):
    options = {"max_body_bytes": 1000, "buffer_bytes": 1000}
    async with serving(folder, headers=ADMIN, admin_key="root", **options) as service:
        assert (await service.put("/models/new", content=tiny)).status_code == 201


async def test_a_full_disk_is_told_and_nothing_stays(service, folder, tiny, monkeypatch):
    monkeypatch.setattr(Incoming, "free", lambda _: len(tiny) - 1)
    refused(await service.put("/models/new", content=tiny), 507, "disk_full")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Incoming, "write", full)
    refused(await service.put("/models/new", content=in_pieces(tiny)), 507, "disk_full")
    assert files(folder) == {"kl.safetensors"}


async def test_a_file_that_stops_is_given_up(service, folder, tiny, monkeypatch):
    monkeypatch.setattr(body, "SILENT_SECONDS", 0.05)

    async def stops():
        yield tiny[:1000]
        await asyncio.sleep(60)

    refused(await service.put("/models/new", content=stops()), 408, "slow_body")
    assert files(folder) == {"kl.safetensors"}


async def test_two_of_one_name_at_once_and_more_than_are_written(service, folder, tiny):
    go = asyncio.Event()

    async def slowly():
        yield tiny[:1000]
        await go.wait()
        yield tiny[1000:]

    first = asyncio.ensure_future(service.put("/models/one", content=slowly()))
    await until(lambda: any(name.startswith(HIDDEN) for name in files(folder)))
    assert "being uploaded" in refused(await service.put("/models/ONE", content=tiny), 409, "model_exists")
    second = asyncio.ensure_future(service.put("/models/two", content=slowly()))
    await until(lambda: sum(name.startswith(HIDDEN) for name in files(folder)) == 2)
    answer = await service.put("/models/three", content=tiny)
    refused(answer, 429, "overloaded")
    assert int(answer.headers["Retry-After"]) >= 1
    assert await names(service) == {"kl"}
    go.set()
    assert [(await task).status_code for task in (first, second)] == [201, 201]
    assert await names(service) == {"kl", "one", "two"}


def test_a_client_that_vanishes_leaves_nothing(folder, tiny):
    with listening(folder, admin_key="root") as (server, port):
        with socket.create_connection(("127.0.0.1", port)) as made:
            head = ("PUT /models/new HTTP/1.1", "Host: x", "Authorization: Bearer root", f"Content-Length: {len(tiny)}")
            made.sendall("\r\n".join((*head, "", "")).encode() + tiny[: len(tiny) // 2])
            asyncio.run(until(lambda: any(name.startswith(HIDDEN) for name in files(folder))))
        asyncio.run(until(lambda: files(folder) == {"kl.safetensors"}))
        assert server.engine.alive


async def test_what_a_process_that_died_left_goes_at_the_start_and_what_lives_stays(folder):
    dead, living = Incoming(folder / "VAE", "dead"), Incoming(folder / "VAE", "living")
    dead._file.close()  # as its process's end does
    async with serving(folder):
        assert not dead.path.exists()
        assert living.path.exists()
    living.discard()
    assert files(folder) == {"kl.safetensors"}


async def test_new_models_go_to_the_first_folder_s_vae(models, tmp_path, tiny):
    first, second = tmp_path / "a", tmp_path / "b"
    for place in (first / "vae_approx", second / "VAE"):
        place.mkdir(parents=True)
    async with serving((first, second), headers=ADMIN, admin_key="root") as service:
        row = (await service.put("/models/new", content=tiny)).json()
        assert row["path"] == str(first / "VAE" / "new.safetensors")
    (tmp_path / "flat").mkdir()
    async with serving(tmp_path / "flat", headers=ADMIN, admin_key="root") as service:
        row = (await service.put("/models/new", content=tiny)).json()
        assert row["path"] == str(tmp_path / "flat" / "new.safetensors")


async def test_a_folder_that_cannot_be_written_to_is_told(service, tiny, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storing, "Incoming", read_only)
    assert "Read-only" in refused(await service.put("/models/new", content=tiny), 503, "unavailable")


async def test_a_model_is_deleted_everywhere(service, folder):
    await service.post("/models/kl/load")
    answer = await service.delete("/models/kl")
    assert (answer.status_code, answer.json()["name"], answer.json()["resident"]) == (200, "kl", [])
    assert files(folder) == set()
    assert await names(service) == set()
    assert service.engine.workers[0].cache.residents() == []
    refused(await service.delete("/models/kl"), 404, "unknown_model")


async def test_a_model_that_is_pinned_or_awaited_stays(service, folder):
    row = (await service.get("/models/kl")).json()
    refused(await service.delete(f"/models/{row['sha256']}"), 404, "unknown_model")
    await service.post("/models/kl/pin")
    refused(await service.delete("/models/kl"), 409, "model_busy")
    await service.post("/models/kl/unpin")
    array_of(await service.post("/encode", content=picture()))
    with occupied(service.engine):
        waiting = [asyncio.ensure_future(service.post("/decode", content=npy(latent(1, 4, n, 4)))) for n in (2, 3, 4)]
        await until(lambda: service.engine.open_requests == 3 and service.engine.workers[0].batcher.items < 3)
        refused(await service.delete("/models/kl"), 409, "model_busy")
    for task in waiting:
        array_of(await service.post("/encode", content=picture())), (await task).raise_for_status()
    assert files(folder) == {"kl.safetensors"}
    assert (await service.delete("/models/kl")).status_code == 200


async def test_of_a_pair_both_halves_go(service, folder):
    state = state_of("taesd")
    for half in ("encoder", "decoder"):
        part = {key.removeprefix(f"{half}."): value for key, value in state.items() if key.startswith(f"{half}.")}
        save_file(part, folder / "VAE" / f"two_{half}.safetensors")
    assert await names(service) == {"kl", "two"}
    answer = await service.delete("/models/two")
    assert answer.status_code == 200, answer.text
    assert files(folder) == {"kl.safetensors"}


async def test_what_holds_more_than_the_model_is_not_deleted(service, folder):
    whole = {f"first_stage_model.{key}": value for key, value in state_of("sd1").items()}
    whole["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(320, 4, 3, 3)
    save_file(whole, folder / "VAE" / "whole.safetensors")
    assert "whole" in await names(service)
    assert "full checkpoint" in refused(await service.delete("/models/whole"), 409, "model_kept")
    assert "whole.safetensors" in files(folder)


async def test_a_folder_of_diffusers_is_not_deleted(service, folder):
    from clients.python.tests.vaes import autoencoder

    autoencoder("sd1").save_pretrained(folder / "VAE" / "tree")
    assert "tree" in await names(service)
    assert "diffusers" in refused(await service.delete("/models/tree"), 409, "model_kept")
    assert (folder / "VAE" / "tree" / "config.json").exists()


async def test_the_embedded_model_is_a_file_like_others(tmp_path):
    (tmp_path / "VAE").mkdir()
    source = Path(__file__).parents[2] / "models" / "VAE" / "latentd-small.safetensors"
    shutil.copy(source, tmp_path / "VAE")
    async with serving(tmp_path, headers=ADMIN, admin_key="root") as service:
        assert (await service.delete("/models/latentd-small")).status_code == 200
        assert await names(service) == set()
        assert (await service.put("/models/latentd-small", content=source.read_bytes())).status_code == 201


async def test_a_file_that_is_no_model_is_not_deleted(service, folder):
    (folder / "VAE" / "text.pt").write_text("not a checkpoint")
    assert "text" in await names(service)
    refused(await service.delete("/models/text"), 422, "unsupported_checkpoint")
    assert "text.pt" in files(folder)


async def test_without_the_admin_key_nothing_comes_or_goes(service, folder, tiny):
    for method in ("PUT", "DELETE"):
        answer = await service.request(method, "/models/kl", content=tiny, headers={"Authorization": "Bearer x"})
        refused(answer, 403, "forbidden")
    assert threading.active_count() < 64


async def test_one_half_of_a_pair_is_told_how_both_are_uploaded(service, folder):
    state = state_of("taesd")
    for half in ("encoder", "decoder"):
        part = {name.removeprefix(f"{half}."): each for name, each in state.items() if name.startswith(f"{half}.")}
        detail = refused(await service.put(f"/models/new_{half}", content=save(part)), 422, "unsupported_checkpoint")
        assert f"only the {half}" in detail
        assert "as one file: `latentd convert`" in detail
    assert files(folder) == {"kl.safetensors"}


@pytest.mark.parametrize(
    ("content", "beside", "gone"),
    [('{"family": "sdxl"}', None, True), ('{"family": "sdxl"}', "kl.ckpt", False), ('{"hash": "abc"}', None, False)],
)
async def test_what_the_operator_wrote_of_a_model_goes_with_it(folder, models, content, beside, gone):
    sidecar = folder / "VAE" / "kl.json"
    sidecar.write_text(content)
    if beside:
        (folder / "VAE" / beside).write_bytes(b"another file of this name")
    async with serving(folder, headers=ADMIN, admin_key="root") as service:
        name = next(iter(name for name in await names(service) if "safetensors" in name), "kl")
        answer = await service.delete(f"/models/{name}")
        assert answer.status_code == 200, answer.text
        assert sidecar.exists() is not gone
        assert not (folder / "VAE" / "kl.safetensors").exists()
