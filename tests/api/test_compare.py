import asyncio
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.api import compare as module
from app.api.compare import _measured
from app.api.schemas import Compared
from app.engine.batcher import Admission
from app.store.checkpoint import CheckpointChanged
from app.wire.difference import difference
from app.wire.images import WHITE
from tests.service import SIDE, array_of, occupied, picture, picture_of, pixels, refused, serving, until

JSON, NPY, PNG, ZIP = "application/json", "application/x-npy", "image/png", "application/zip"
NUMBERS = ("psnr_db", "ssim", "luminance_shift", "saturation_shift", "hue_shift_degrees")


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl") as service:
        yield service


@pytest.fixture
def folder(models, tmp_path):
    """The models, one whose output is NaN, and one that cannot be read."""
    shutil.copytree(models, tmp_path / "models")
    state = load_file(models / "VAE" / "kl.safetensors")
    state["decoder.conv_out.bias"] = torch.full_like(state["decoder.conv_out.bias"], torch.nan)
    save_file(state, tmp_path / "models" / "VAE" / "nan.safetensors")
    (tmp_path / "models" / "VAE" / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return tmp_path / "models"


async def numbers(service, query="", **request):
    answer = await service.post(f"/compare{query}", **{"content": picture(), **request}, headers={"Accept": JSON})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == JSON
    return answer.json()


def idle(service) -> bool:
    return all(worker.batcher.items == worker.batcher.pixels == 0 for worker in service.engine.workers)


async def test_a_contact_sheet_is_the_default(service):
    answer = await service.post("/compare", content=picture())
    sheet = picture_of(answer)
    assert (sheet.format, sheet.mode, answer.headers["content-type"]) == ("PNG", "RGB", PNG)
    assert answer.headers["X-Image-Size"] == f"{SIDE}x{SIDE}"
    assert [part.split(";")[0] for part in answer.headers["Server-Timing"].split(", ")] == [
        *("read", "queue", "load", "compute", "write")
    ]
    assert sheet.width > 3 * 256  # the original and two models, enlarged
    assert idle(service)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (35, 33), (3, 41)])
async def test_the_numbers_are_those_of_encode_and_decode(service, size):
    original = pixels(*size)
    found = await numbers(service, "?models=tiny,kl", content=picture(*size))
    assert found["image_size"] == f"{size[0]}x{size[1]}"
    assert [row["model"] for row in found["models"]] == ["tiny", "kl"]
    for row in found["models"]:
        latents = await service.post(f"/encode?model={row['model']}", content=picture(*size))
        query = {"model": row["model"], "size": f"{size[0]}x{size[1]}"}
        decoded = await service.post("/decode", content=latents.content, params=query, headers={"Accept": NPY})
        expected = difference(original, array_of(decoded)[0])
        assert row["sha256"] == decoded.headers["X-Model-SHA256"]
        assert row["plan"] == decoded.headers["X-Plan"]
        assert row["error"] is None
        assert row["identical"] is False
        assert [row[name] for name in NUMBERS] == pytest.approx(
            [expected.psnr, expected.ssim, expected.luminance, expected.saturation, expected.hue], abs=2e-3
        )


async def test_a_zip_has_the_sheet_and_the_numbers(service):
    answer = await service.post("/compare", content=picture(), headers={"Accept": ZIP})
    assert answer.headers["content-type"] == ZIP
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["sheet.png", "numbers.json"]
        assert archive.read("sheet.png") == (await service.post("/compare", content=picture())).content
        assert json.loads(archive.read("numbers.json")) == await numbers(service)


async def test_all_usable_models_are_taken_where_none_is_named(folder):
    async with serving(folder) as service:
        found = await numbers(service)
        assert [row["model"] for row in found["models"]] == ["kl", "nan", "tiny"]


async def test_a_model_that_fails_says_so_and_the_others_stand(folder):
    async with serving(folder) as service:
        found = await numbers(service, "?models=nan,kl,torn")
        nan, kl, torn = found["models"]
        assert "nan" in nan["error"]
        assert nan["family"] == "sd1"
        assert "torn" in torn["error"]
        assert (torn["family"], torn["sha256"]) == (None, None)
        assert [row[name] for row in (nan, torn) for name in NUMBERS] == [None] * 10
        assert kl["error"] is None
        assert kl["psnr_db"] > 0
        assert idle(service)
        picture_of(await service.post("/compare?models=nan,kl,torn", content=picture()))
        refused(await service.post("/compare?models=nan", content=picture()), 500, "non_finite_output")
        refused(await service.post("/compare?models=torn,nan", content=picture()), 422, "unsupported_checkpoint")
        assert idle(service)


async def test_a_name_and_a_hash_are_one_model(service):
    sha256 = (await service.get("/models/kl")).json()["sha256"]
    found = await numbers(service, f"?models=kl, {sha256[:12]},kl")
    assert [row["model"] for row in found["models"]] == ["kl"]


async def test_precision_and_tiling_reach_the_plan(service):
    found = await numbers(service, "?models=kl&precision=bf16&tiling=always")
    assert [row["plan"] for row in found["models"]] == ["bf16/strips"]


async def test_crop_and_resize_are_measured_on_what_was_fitted(service):
    for fit in ("crop", "resize"):
        found = await numbers(service, f"?fit={fit}&models=kl", content=picture(35, 33))
        assert found["image_size"] == "32x32"
    small = np.array(Image.fromarray(pixels(35, 33)).crop((1, 0, 33, 32)))
    file = io.BytesIO()
    Image.fromarray(small).save(file, "PNG")
    cropped = await numbers(service, "?fit=crop&models=kl", content=picture(35, 33))
    assert cropped["models"] == (await numbers(service, "?models=kl", content=file.getvalue()))["models"]
    answer = await service.post("/compare?fit=error", content=picture(35, 33))
    assert "35x33" in refused(answer, 422, "invalid_image")


async def test_alpha_is_flattened_as_for_encode(service):
    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    clear, red = Image.new("RGBA", (SIDE, SIDE), (0, 255, 0, 0)), Image.new("RGB", (SIDE, SIDE), (255, 0, 0))
    found = await numbers(service, "?background=ff0000", content=png(clear))
    assert found == await numbers(service, content=png(red))
    assert found != await numbers(service, content=png(clear))


@pytest.mark.parametrize(
    ("query", "status", "code", "names"),
    [
        ("?models=nobody", 404, "unknown_model", "nobody"),
        ("?models=kl,nobody", 404, "unknown_model", "nobody"),
        ("?models=", 422, "invalid_parameter", "models"),
        ("?models=,%20,", 422, "invalid_parameter", "models"),
        ("?model=kl", 422, "invalid_parameter", "model"),
        ("?latents=raw", 422, "invalid_parameter", "latents"),
        ("?precision=fp8", 422, "invalid_parameter", "precision"),
        ("?background=red", 422, "invalid_parameter", "background"),
    ],
)
async def test_queries_are_refused_by_name(service, query, status, code, names):
    assert names in refused(await service.post(f"/compare{query}", content=picture()), status, code)


async def test_bodies_and_types_that_do_not_fit(service):
    refused(await service.post("/compare", content=b"no picture"), 415, "unsupported_media")
    refused(await service.post("/compare", content=picture()[:60]), 400, "malformed_body")
    refused(await service.post("/compare", content=picture(), headers={"Accept": NPY}), 406, "not_acceptable")
    two = [("image", (name, picture())) for name in "ab"]
    assert "2" in refused(await service.post("/compare", files=two), 422, "invalid_parameter")
    picture_of(await service.post("/compare", files=two[:1]))
    assert idle(service)


async def test_models_times_pixels_are_bounded(models, monkeypatch):
    async with serving(models, max_pixels=SIDE * SIDE, queue_pixels=3 * SIDE * SIDE) as service:
        refused(await service.post("/compare", content=picture()), 413, "too_large")  # 2 models, both ways: 4
        await numbers(service, "?models=kl")
        refused(await service.post("/compare?models=kl", content=picture(SIDE + 1)), 413, "too_large")
    async with serving(models, queue_size=3) as service:
        refused(await service.post("/compare", content=picture()), 413, "too_large")
        await numbers(service, "?models=kl")
        monkeypatch.setattr(module, "MOST", 1)
        assert "at most 1" in refused(await service.post("/compare", content=picture()), 422, "invalid_parameter")


async def test_a_full_queue_refuses_it_at_the_door(models):
    async with serving(models, queue_size=4) as service:
        with occupied(service.engine):
            first = asyncio.create_task(service.post("/compare", content=picture()))
            await until(lambda: service.engine.workers[0].batcher.items >= 3)
            answer = await service.post("/compare", content=picture())
            refused(answer, 429, "overloaded")
            assert int(answer.headers["Retry-After"]) >= 1
        picture_of(await first)
        assert idle(service)


async def test_a_deadline_that_passes_ends_all_of_it(models):
    async with serving(models) as service:
        with occupied(service.engine):
            headers = {"X-Request-Timeout-Ms": "100"}
            waiting = asyncio.create_task(service.post("/compare", content=picture(), headers=headers))
            await asyncio.sleep(0.4)
        refused(await waiting, 504, "deadline_exceeded")
        assert idle(service)


class Replaced:
    """Model files that are replaced while a request waits: the first runs of these models find their files changed."""

    def __init__(self, monkeypatch, service, times):
        self.times, self.waited = times, []
        self.run = Admission.run

        async def run(admission, arrays):
            return await self.ran(admission, arrays)

        monkeypatch.setattr(Admission, "run", run)
        monkeypatch.setattr(service.engine, "replaced", self.wait)

    async def ran(self, admission, arrays):
        name = admission._task.checkpoint.name
        if self.times.get(name, 0):
            self.times[name] -= 1
            raise CheckpointChanged("replaced again and again")
        return await self.run(admission, arrays)

    async def wait(self, checkpoint, deadline):
        self.waited.append(checkpoint.name)


async def test_a_model_whose_file_is_replaced_meanwhile_is_taken_anew(service, monkeypatch):
    replaced = Replaced(monkeypatch, service, {"kl": 1})
    found = await numbers(service)
    assert replaced.waited == ["kl"]
    assert [row["error"] for row in found["models"]] == [None, None]
    assert idle(service)


async def test_a_replaced_model_finds_room_in_a_queue_that_just_held_them_all(models, monkeypatch):
    async with serving(models, queue_size=4) as service:
        Replaced(monkeypatch, service, {"kl": 1})
        found = await numbers(service)
        assert [row["error"] for row in found["models"]] == [None, None]
        assert idle(service)


async def test_a_model_that_never_keeps_still_is_its_own_failure(service, monkeypatch):
    Replaced(monkeypatch, service, {"kl": 99})
    found = await numbers(service)
    assert [row["error"] for row in found["models"]] == ["replaced again and again", None]
    assert idle(service)


def test_what_comes_back_unchanged_has_no_finite_psnr_and_the_json_says_so():
    row, cell = _measured(Compared(model="a", family="sd1"), "fp32/whole", pixels(20, 10), pixels(20, 16)[:16], WHITE)
    assert row.psnr_db is not None
    row, cell = _measured(Compared(model="a", family="sd1"), "fp32/whole", pixels(), pixels(), WHITE)
    assert (row.identical, row.psnr_db, row.ssim) == (True, None, 1.0)
    assert any("identical" in line for line in cell.lines)
    assert json.loads(row.model_dump_json())["psnr_db"] is None


async def test_it_is_counted_and_described(service):
    before = service.count("vae_requests_total", op="compare", model="", status="200")
    picture_of(await service.post("/compare?models=kl", content=picture()))
    assert service.count("vae_requests_total", op="compare", model="", status="200") == before + 1
    document = (await service.get("/openapi.json")).json()["paths"]["/compare"]["post"]
    assert set(document["responses"]["200"]["content"]) == {PNG, JSON, ZIP, "application/octet-stream"}
    assert {parameter["name"] for parameter in document["parameters"]} == {
        *("models", "precision", "tiling", "fit", "background", "X-Request-Timeout-Ms", "X-Request-Id")
    }


async def test_a_list_of_models_is_counted_before_any_is_looked_for(service, monkeypatch):
    async def look(*_):
        raise AssertionError("one was looked for")

    monkeypatch.setattr(service.engine, "resolve", look)
    names = ",".join(map(str, range(65)))
    answer = await service.post(f"/compare?models={names}", content=picture())
    assert "65 models; at most 64" in refused(answer, 422, "invalid_parameter")


async def test_a_model_with_alpha_is_given_an_opaque_picture(rgba):
    async with serving(rgba) as service:
        found = await numbers(service)
        assert [row["error"] for row in found["models"]] == [None]
        sheet = await service.post("/compare", content=picture(40, 35), headers={"Accept": "image/png"})
        assert picture_of(sheet).mode == "RGB"
