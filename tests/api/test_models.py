import asyncio
import hashlib
import json
import shutil
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.torch import save_file

from app.api.schemas import Model
from app.engine.planner import Planner
from app.engine.worker import MOST_ASKED
from app.text import one_line
from tests.service import array_of, latent, npy, occupied, picture, picture_of, refused, serving, until
from tests.store.weights import state_of

FIELDS = {
    *(
        "name",
        "path",
        "family",
        "family_source",
        "format",
        "sha256",
        "known_as",
        "copy_of",
        "parameters",
        "latent_channels",
    ),
    *("spatial_factor", "pixel_channels", "scaling_factor", "shift_factor", "fp16", "resident", "error"),
}
EFFECT_SECONDS = 2.0  # a change in the folder takes effect within this time
ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, admin_key="root") as service:
        yield service


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A folder of its own, to be changed: one model, `kl`."""
    (tmp_path / "VAE").mkdir()
    shutil.copy(models / "VAE" / "kl.safetensors", tmp_path / "VAE")
    return tmp_path


async def rows(service):
    return {row["name"]: row for row in (await service.get("/models")).json()["models"]}


def test_numbers_per_channel_are_a_list():
    row = Model(name="x", path="x", scaling_factor=(0.5, 2.0), shift_factor=0.0)
    assert json.loads(row.model_dump_json())["scaling_factor"] == [0.5, 2.0]


async def test_one_model_s_row_has_the_statistics_that_its_latents_are_scaled_by(tmp_path):
    state = state_of("flux2")
    save_file(state, tmp_path / "packed.safetensors")
    async with serving(tmp_path) as service:
        await until(lambda: service.engine.scanned)
        assert set((await rows(service))["packed"]) == FIELDS
        found = (await service.get("/models/packed")).json()["statistics"]
    assert (found["eps"], found["patch"]) == (1e-4, 2)
    np.testing.assert_array_equal(np.float32(found["mean"]), state["bn.running_mean"])
    np.testing.assert_array_equal(np.float32(found["variance"]), state["bn.running_var"])


async def test_the_list_says_what_a_request_without_a_model_means(models, tmp_path):
    shutil.copytree(models / "VAE", tmp_path / "VAE")
    async with serving(tmp_path) as service:
        assert (await service.get("/models")).json()["default"] is None
        (tmp_path / "VAE" / "kl.safetensors").unlink()
        assert (await service.get("/models")).json()["default"] == "tiny"
    async with serving(models, default_model="kl") as service:
        assert (await service.get("/models")).json()["default"] == "kl"


async def test_a_row_has_these_fields_exactly(service, models):
    answer = await service.get("/models")
    assert set(answer.json()) == {"models", "default"}
    found = await rows(service)
    assert list(found) == ["kl", "tiny"]
    assert all(set(row) == FIELDS for row in found.values())
    row = found["kl"]
    digest = row.pop("sha256")
    assert len(digest) == 64
    assert row.pop("parameters") > 100_000
    row.pop("resident")
    assert row == {
        "name": "kl",
        "path": str(models / "VAE" / "kl.safetensors"),
        "family": "sd1",
        "family_source": "default",
        "format": "safetensors",
        "known_as": None,
        "copy_of": None,
        "latent_channels": 4,
        "spatial_factor": 8,
        "pixel_channels": 3,
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
        "fp16": "unknown",
        "error": None,
    }
    assert (await service.get("/models/kl")).json()["sha256"] == digest
    assert (await service.get(f"/models/{digest[:8]}")).json()["name"] == "kl"


async def test_a_model_is_meant_by_name_by_hash_or_not_at_all(service):
    digest = (await rows(service))["tiny"]["sha256"]
    for wanted in ("tiny", digest, digest[:8], digest[:8].upper()):
        answer = await service.post("/encode", params={"model": wanted}, content=picture())
        assert answer.headers["X-Model"] == "tiny"
    refused(await service.post("/encode", params={"model": digest[:7]}, content=picture()), 404, "unknown_model")
    detail = refused(await service.post("/encode", content=picture()), 422, "invalid_parameter")
    assert "kl, tiny" in detail


async def test_the_only_model_is_the_default(folder):
    async with serving(folder) as service:
        assert (await service.post("/encode", content=picture())).headers["X-Model"] == "kl"


@pytest.mark.parametrize(
    "name",
    ["nothing", "../VAE/kl", "..", "VAE/kl.safetensors/..", "kl\0", "kl ", "%", "\r\nX-Evil: 1", "\udcff", "ключ"],
)
async def test_unknown_names_are_404_wherever_they_stand(service, name):
    query = {"model": name.encode(errors="surrogateescape")}
    answer = await service.request("POST", "/encode", params=query, content=picture())
    refused(answer, 404, "unknown_model")
    assert "x-evil" not in answer.headers
    path = "/models/" + quote(name.encode(errors="surrogateescape"), safe="").replace("..", "%2E%2E")
    assert (await service.get(path)).status_code == 404
    assert (await service.post(f"{path}/load", headers=ADMIN)).status_code == 404


async def test_models_of_one_stem_are_told_apart_by_their_folders(folder):
    for place in ("a", "b"):
        (folder / "VAE" / place).mkdir()
        save_file(state_of("taesd", seed=ord(place)), folder / "VAE" / place / "twin.safetensors")
    async with serving(folder) as service:
        assert set(await rows(service)) == {"kl", "a/twin", "b/twin"}
        answer = await service.post("/encode?model=a/twin", content=picture())
        assert answer.headers["X-Model"] == "a/twin"
        assert (await service.get("/models/b/twin")).json()["name"] == "b/twin"
        assert (await service.get("/models/b%2Ftwin/plan")).status_code == 200


@pytest.mark.parametrize(
    ("stem", "header"),
    [
        ("my vae (v2)", "my vae (v2)"),
        ("100%", "100%25"),
        ("ключ", "%D0%BA%D0%BB%D1%8E%D1%87"),
        ("ä", "%C3%A4"),
        (" kl ", "%20kl%20"),
        ("a\r\nX-Evil: 1", r"a\r\nX-Evil: 1"),
    ],
)
async def test_a_name_that_is_not_ascii_is_percent_encoded_in_the_header(folder, stem, header):
    """And one with line breaks is called by their escapes, on every route."""
    (folder / "VAE" / "kl.safetensors").rename(folder / "VAE" / f"{stem}.safetensors")
    stem = one_line(stem)
    async with serving(folder) as service:
        assert (await service.get(f"/models/{quote(stem)}")).json()["name"] == stem
        answer = await service.post("/encode", params={"model": stem}, content=picture())
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Model"] == header
        assert "x-evil" not in answer.headers
        assert list(await rows(service)) == [stem]
        assert (await service.get("/metrics")).status_code == 200


async def test_a_file_that_cannot_be_read_is_listed_and_refused_with_its_reason(folder):
    (folder / "VAE" / "broken.safetensors").write_bytes(b"\xff" * 100)
    (folder / "VAE" / "text.pt").write_text("not a checkpoint")
    async with serving(folder, default_model="kl") as service:
        found = await rows(service)
        assert set(found) == {"kl", "broken", "text"}
        for name in ("broken", "text"):
            row = found[name]
            assert set(row) == FIELDS
            assert row["error"]
            assert row["sha256"] is None
            answer = await service.post("/decode", params={"model": name}, content=npy(latent()))
            assert name in refused(answer, 422, "unsupported_checkpoint")
            assert (await service.get(f"/models/{name}")).json() == row | {"statistics": None}
        picture_of(await service.post("/decode", content=npy(latent())))


async def test_files_come_and_go_without_a_restart(folder):
    path = folder / "VAE" / "new.safetensors"
    async with serving(folder, default_model="kl") as service:
        first = await service.post("/encode", content=picture())
        before, sha256 = array_of(first), first.headers["X-Model-SHA256"]
        refused(await service.post("/encode?model=new", content=picture()), 404, "unknown_model")
        save_file(state_of("taesd"), path)
        assert (await service.post("/encode?model=new", content=picture())).status_code == 200
        replaced = folder / "VAE" / "kl.partial"
        save_file(state_of("sd1", seed=1), replaced)
        replaced.replace(folder / "VAE" / "kl.safetensors")
        async with asyncio.timeout(EFFECT_SECONDS):
            while (answer := await service.post("/encode", content=picture())).headers["X-Model-SHA256"] == sha256:
                assert np.array_equal(array_of(answer), before)  # the old weights serve until the new file is whole
        assert (array_of(answer) != before).any()
        path.unlink()
        refused(await service.post("/encode?model=new", content=picture()), 404, "unknown_model")


async def test_a_file_is_renamed_and_its_old_name_is_gone(folder):
    old, new = (folder / "VAE" / f"{name}.safetensors" for name in ("kl", "other"))
    async with serving(folder) as service:
        sha256 = (await service.post("/encode", content=picture())).headers["X-Model-SHA256"]
        old.rename(new)
        assert (await service.post("/encode?model=other", content=picture())).headers["X-Model-SHA256"] == sha256
        refused(await service.post("/encode?model=kl", content=picture()), 404, "unknown_model")
        assert list(await rows(service)) == ["other"]


async def test_a_request_whose_file_is_replaced_before_it_is_loaded_runs_with_the_new_one(folder):
    path = folder / "VAE" / "kl.safetensors"
    async with serving(folder) as service:
        (row,) = (await rows(service)).values()
        save_file(state_of("sd1", seed=1), path)  # nothing is resident
        answer = await service.post("/encode", content=picture())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert row["sha256"] != sha256
        assert answer.headers["X-Model-SHA256"] == sha256
        array_of(answer)
        alone = array_of(await service.post("/encode", content=picture()))
        assert np.array_equal(array_of(answer), alone)


async def test_a_request_by_hash_is_never_served_by_other_weights(folder):
    path = folder / "VAE" / "kl.safetensors"
    async with serving(folder) as service:
        sha256 = (await rows(service))["kl"]["sha256"]
        save_file(state_of("sd1", seed=1), path)
        answer = await service.post(f"/encode?model={sha256[:12]}", content=picture())
        refused(answer, 404, "unknown_model")


async def test_a_removed_file_is_served_out_where_it_is_resident_and_else_unknown(folder):
    path = folder / "VAE" / "kl.safetensors"
    async with serving(folder, admin_key="root") as service:
        array_of(await service.post("/encode", content=picture()))
        with occupied(service.engine):
            waiting = [asyncio.ensure_future(service.post("/encode", content=picture())) for _ in range(3)]
            await until(lambda: service.engine.open_requests == 3)
            path.unlink()
            await service.engine.folder.look()
        for task in waiting:
            array_of(await task)
        refused(await service.post("/encode?model=kl", content=picture()), 404, "unknown_model")
    save_file(state_of("sd1"), path)
    async with serving(folder) as service:
        with occupied(service.engine):
            service.engine.workers[0]._stage_thread.submit(path.unlink).result()
            refused(await service.post("/encode?model=kl", content=picture()), 404, "unknown_model")


async def test_a_request_that_waits_for_a_replacement_ends_at_its_deadline(folder):
    path = folder / "VAE" / "kl.safetensors"
    async with serving(folder) as service:
        writing = asyncio.Event()

        async def write_on() -> None:
            while not writing.is_set():
                path.write_bytes(path.read_bytes()[:-1])
                await asyncio.sleep(0.1)

        scribe = asyncio.ensure_future(write_on())
        await asyncio.sleep(0)
        answer = await service.post("/encode", content=picture(), headers={"X-Request-Timeout-Ms": "700"})
        assert answer.json()["code"] in ("model_changed", "overloaded", "deadline_exceeded")
        assert answer.json()["retryable"]
        writing.set()
        await scribe


async def test_copies_are_listed_as_copies(folder):
    path = folder / "VAE" / "kl.safetensors"
    shutil.copy(path, folder / "VAE" / "kl-copy.safetensors")
    save_file({key: value.half() for key, value in state_of("sd1").items()}, folder / "VAE" / "kl-half.safetensors")
    async with serving(folder) as service:
        found = await rows(service)
        assert {name: row["copy_of"] for name, row in found.items()} == {"kl": None, "kl-copy": "kl", "kl-half": "kl"}
        await service.post("/encode?model=kl", content=picture())
        await service.post("/encode?model=kl-copy", content=picture())
        assert service.count("vae_model_loads_total", result="ok") == 1


async def test_a_folder_that_changes_under_load_fails_nobody(folder):
    states = [state_of("sd1", seed=seed) for seed in range(2)]

    async def replace(seed):
        partial = folder / "VAE" / "kl.partial"
        await asyncio.to_thread(save_file, states[seed % 2], partial)
        partial.replace(folder / "VAE" / "kl.safetensors")

    async with serving(folder) as service:
        for seed in range(4):
            requests = [service.post("/encode", content=picture(seed=number)) for number in range(4)]
            answers, _ = await asyncio.gather(asyncio.gather(*requests), replace(seed))
            for answer in answers:
                array_of(answer)
            array_of(await service.post("/encode", content=picture()))


async def test_a_plan_is_a_forecast(service):
    body = (await service.get("/models/kl/plan?op=decode&width=32&height=32")).json()
    assert set(body) == {"device", "plan", "forecast_bytes", "free_bytes", "available_bytes", "plans"}
    assert body["device"] == "cpu"
    assert body["plan"] == "fp32/whole"
    assert body["plans"]["fp32/whole"] == body["forecast_bytes"] > 32 * 32 * 3
    encode = (await service.get("/models/kl/plan?op=encode&width=32&height=32&tiling=always")).json()
    assert encode["plan"] == "fp32/strips"
    assert (await service.get("/models/kl/plan")).status_code == 200
    for query in ("width=0", "height=-1", "op=both", "width=x", "depth=1", "width=1&width=2"):
        name = query.partition("=")[0]
        assert name in refused(await service.get(f"/models/kl/plan?{query}"), 422, "invalid_parameter")
    refused(await service.get("/models/none/plan"), 404, "unknown_model")


async def test_the_plan_is_what_a_request_gets(folder):
    async with serving(folder) as service:
        plans = (await service.get("/models/kl/plan?width=64&height=64")).json()["plans"]
        weights = 4 * (await rows(service))["kl"]["parameters"]
    limit = weights + (plans["fp32/whole"] + plans["fp32/strips"]) // 2
    async with serving(folder, memory_limit_bytes=limit) as service:
        assert (await service.get("/models/kl/plan?width=64&height=64")).json()["plan"] == "fp32/strips"
        answer = await service.post("/decode", content=npy(latent(1, 4, 8, 8)))
        assert (answer.headers["X-Plan"], answer.headers["X-Plan-Reason"]) == ("fp32/strips", "low_memory")
        never = await service.post("/decode?tiling=never", content=npy(latent(1, 4, 8, 8)))
        refused(never, 507, "out_of_memory")
        assert service.count("vae_rejected_total", reason="vram") == 1


async def test_load_pin_and_unload(folder):
    async with serving(folder, admin_key="root") as service:

        async def change(what):
            answer = await service.post(f"/models/kl/{what}", headers=ADMIN)
            return answer if answer.is_error else answer.json()

        assert (await rows(service))["kl"]["resident"] == []
        loaded = (await change("load"))["resident"]
        assert [set(resident) for resident in loaded] == [{"device", "dtype", "bytes", "in_use", "pinned"}]
        assert loaded[0]["device"] == "cpu"
        assert loaded[0]["dtype"] == "fp32"
        assert loaded[0]["bytes"] > 0
        assert (loaded[0]["in_use"], loaded[0]["pinned"]) == (0, False)
        both = (await change("load?dtype=bf16"))["resident"]
        assert {resident["dtype"] for resident in both} == {"fp32", "bf16"}
        assert all(resident["pinned"] for resident in (await change("pin"))["resident"])
        refused(await change("unload"), 409, "model_busy")
        assert not any(resident["pinned"] for resident in (await change("unpin"))["resident"])
        assert (await change("unload"))["resident"] == []
        assert "dtype" in refused(await change("load?dtype=int8"), 422, "invalid_parameter")
        for what in ("load", "unload", "pin", "unpin"):
            refused(await change(f"{what}?x=1"), 422, "invalid_parameter")


async def test_a_model_in_use_is_not_unloaded(folder):
    async with serving(folder, admin_key="root") as service:
        array_of(await service.post("/encode", content=picture()))
        with occupied(service.engine):
            request = asyncio.ensure_future(service.post("/encode", content=picture()))
            await until(lambda: service.engine.workers[0].cache.residents()[0].in_use > 0)
            refused(await service.post("/models/kl/unload", headers=ADMIN), 409, "model_busy")
        array_of(await request)


async def test_unknown_parameters_are_refused_here_too(service):
    for path in ("/models", "/models/kl"):
        assert "x: there is no" in refused(await service.get(f"{path}?x=1"), 422, "invalid_parameter")


async def test_a_verdict_is_taken_back_by_the_admin(models):
    async with serving(models, admin_key="root", headers={"Authorization": "Bearer root"}) as service:
        checkpoint = await service.engine.resolve("kl")
        service.engine._verdicts.overflowed(checkpoint)
        assert (await service.get("/models/kl")).json()["fp16"] == "overflows"
        assert (await service.post("/models/kl/retest")).json()["fp16"] == "unknown"
        assert (await service.get("/models/kl")).json()["fp16"] == "unknown"


async def test_questions_for_plans_are_bounded_and_hold_up_nobody(models, monkeypatch):
    """Sixty of new sizes made a decode wait for 25 s."""
    gate = threading.Event()
    answer = Planner.answer

    def slow(planner, *args):
        assert gate.wait(60)
        return answer(planner, *args)

    monkeypatch.setattr(Planner, "answer", slow)
    async with serving(models, default_model="kl") as service:
        asked = [
            asyncio.ensure_future(service.get(f"/models/kl/plan?width={64 + 8 * index}&height=64"))
            for index in range(MOST_ASKED + 12)
        ]
        await until(lambda: sum(each.done() for each in asked) == 12)
        refusals = [each.result() for each in asked if each.done()]
        assert {refusal.status_code for refusal in refusals} == {429}
        assert refusals[0].headers["Retry-After"]
        assert (await service.post("/decode", content=npy(latent()))).status_code == 200
        gate.set()
        assert sorted(answer.status_code for answer in await asyncio.gather(*asked)) == [200] * MOST_ASKED + [429] * 12


async def test_the_metrics_forget_models_that_have_gone(models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    async with serving(tmp_path) as service:
        for name in ("kl", "tiny"):
            assert (await service.post(f"/encode?model={name}", content=picture())).status_code == 200
        assert 'model="kl"' in (await service.get("/metrics")).text
        (tmp_path / "VAE" / "kl.safetensors").unlink()
        await until_gone(service, "kl")
        text = (await service.get("/metrics")).text
        assert 'vae_requests_total{model="kl"' not in text.replace('op="encode",', "")
        assert "tiny" in text


async def until_gone(service, name):
    async with asyncio.timeout(30):
        while name in [row["name"] for row in (await service.get("/models")).json()["models"]]:
            pass
