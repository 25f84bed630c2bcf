import asyncio
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from app.engine import previews
from tests.service import array_of, latent, npy, occupied, picture_of, refused, serving, until
from tests.store.weights import state_of


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models) as service:
        yield service


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is, no tiny preview is dropped for its time."""
    monkeypatch.setattr("app.api.preview.PATIENCE_SECONDS", 60.0)


async def fitted(service, path, latents=None):
    """The answer, once the map is fitted."""
    async with asyncio.timeout(300):
        body = npy(latent() if latents is None else latents)
        while (answer := await service.post(path, content=body)).status_code == 503:
            assert answer.headers["Retry-After"] == "1"
            assert "being fitted" in refused(answer, 503, "unavailable")
            await asyncio.sleep(0.05)
    return answer


async def test_a_linear_preview_is_fitted_in_the_background_and_then_small(service):
    first = await service.post("/decode?model=kl&preview=linear&latents=raw", content=npy(latent()))
    refused(first, 503, "unavailable")
    answer = await fitted(service, "/decode?model=kl&preview=linear&latents=raw")
    shown = picture_of(answer)
    assert (shown.format, shown.size) == ("WEBP", (4, 4))
    assert answer.headers["X-Image-Size"] == "4x4"
    how, _, near = answer.headers["X-Preview"].partition(";db=")
    assert how == "linear"
    assert 3 < float(near) < 60
    assert answer.headers["X-Plan"] == "linear"
    assert answer.headers["X-Model"] == "kl"
    assert service.count("vae_requests_total", op="preview", model="kl", status="200") >= 1


async def test_the_folder_s_tiny_autoencoder_goes_before_and_its_error_is_measured(service):
    await service.engine.first_scan()
    async with asyncio.timeout(300):
        while True:
            answer = await service.post("/decode?model=kl&preview=true", content=npy(latent()))
            assert picture_of(answer).size == (32, 32)
            if ";db=" in answer.headers["X-Preview"]:
                break
            assert answer.headers["X-Preview"] == "tiny:tiny"
            await asyncio.sleep(0.05)
    own = await service.post("/decode?model=tiny&preview=tiny", content=npy(latent()))
    assert own.headers["X-Preview"] == "tiny:tiny"
    whole = array_of(
        await service.post("/decode?model=tiny", content=npy(latent()), headers={"Accept": "application/x-npy"})
    )
    png = await service.post("/decode?model=tiny&preview=tiny", content=npy(latent()), headers={"Accept": "image/png"})
    assert np.array_equal(np.asarray(picture_of(png)), whole[0])


async def test_a_model_without_a_tiny_one_says_so_where_it_is_insisted_on(models, tmp_path):
    (tmp_path / "VAE").mkdir()
    save_file(state_of("sd1"), tmp_path / "VAE" / "kl.safetensors")
    async with serving(tmp_path) as service:
        refused(await service.post("/decode?preview=tiny", content=npy(latent())), 404, "unknown_model")
        answer = await fitted(service, "/decode?preview=true")
        assert answer.headers["X-Preview"].startswith("linear")
        kept = json.loads((tmp_path / ".latentd-previews.json").read_text())
        assert [(row["family"], row["latents"]) for row in kept["rows"]] == [("sd1", "scaled")]
    async with serving(tmp_path) as service:  # a restart fits nothing
        again = await service.post("/decode?preview=true", content=npy(latent()))
        assert again.content == answer.content
        (tmp_path / ".latentd-previews.json").write_text("{")


async def test_a_preview_may_be_resized_and_has_a_type(service):
    await fitted(service, "/decode?model=kl&preview=linear")
    for accept, kind in (("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/*", "WEBP")):
        answer = await service.post(
            "/decode?model=kl&preview=linear&size=24x16", content=npy(latent()), headers={"Accept": accept}
        )
        assert (picture_of(answer).format, picture_of(answer).size) == (kind, (24, 16))
    refused(
        await service.post("/decode?model=kl&preview=linear&size=33x1", content=npy(latent())), 422, "invalid_parameter"
    )
    refused(
        await service.post("/decode?model=kl&preview=linear&size=1x1,2x2", content=npy(latent())),
        422,
        "invalid_parameter",
    )
    zipped = await service.post(
        "/decode?model=kl&preview=linear", content=npy(latent()), headers={"Accept": "application/zip"}
    )
    refused(zipped, 406, "not_acceptable")


@pytest.mark.parametrize("query", ["fit=pad", "dtype=float32", "bits=16", "precision=fp32", "tiling=always"])
async def test_what_a_preview_does_not_have_is_refused(service, query):
    answer = await service.post(f"/decode?model=kl&preview=true&{query}", content=npy(latent()))
    assert query.partition("=")[0] in refused(answer, 422, "invalid_parameter")


async def test_latents_are_judged_as_for_a_decode(service):
    await fitted(service, "/decode?model=kl&preview=linear")
    path = "/decode?model=kl&preview=linear"
    refused(await service.post(path, content=npy(latent(2, 4, 4, 4))), 422, "invalid_parameter")
    refused(await service.post(path, content=npy(latent(1, 5, 4, 4))), 422, "invalid_latent")
    refused(await service.post(path, content=npy(latent() * np.float16("nan"))), 422, "invalid_latent")
    refused(await service.post(path, content=b"PNG"), 415, "unsupported_media")
    headers = {"X-Latents-Family": "flux"}
    refused(await service.post(path, content=npy(latent()), headers=headers), 409, "family_mismatch")
    refused(await service.post("/decode?model=kl&preview=false", content=npy(latent())), 422, "invalid_parameter")


async def test_previews_beyond_the_most_are_refused(service, monkeypatch):
    await fitted(service, "/decode?model=kl&preview=linear")
    monkeypatch.setattr(previews, "MOST", 0)
    answer = await service.post("/decode?model=kl&preview=linear", content=npy(latent()))
    assert "dropped first" in refused(answer, 429, "overloaded")
    assert answer.headers["Retry-After"] == "1"
    assert service.count("vae_rejected_total", reason="preview") >= 1


async def test_bodies_that_do_not_end_take_no_place(service):
    await fitted(service, "/decode?model=kl&preview=linear")
    room = service.app.state.context.room

    async def stops():
        yield npy(latent())[:9]
        await asyncio.Event().wait()

    def half():
        path, headers = "/decode?model=kl&preview=linear", {"Content-Length": "500"}
        return asyncio.ensure_future(service.post(path, content=stops(), headers=headers))

    slow = [half() for _ in range(previews.MOST)]
    await until(lambda: room.used >= len(slow) * 500)
    picture_of(await service.post("/decode?model=kl&preview=linear", content=npy(latent())))
    for each in slow:
        each.cancel()
    await asyncio.wait(slow)
    await until(lambda: room.used == 0)


async def test_a_linear_preview_does_not_wait_for_the_device_and_a_tiny_one_not_long(service, monkeypatch):
    await fitted(service, "/decode?model=kl&preview=linear")
    monkeypatch.setattr("app.api.preview.PATIENCE_SECONDS", 0.2)
    with occupied(service.engine):
        full = asyncio.ensure_future(service.post("/decode?model=kl", content=npy(latent())))
        await until(lambda: service.engine.workers[0].busy)
        picture_of(await service.post("/decode?model=kl&preview=linear", content=npy(latent())))
        dropped = asyncio.ensure_future(service.post("/decode?model=kl&preview=tiny", content=npy(latent())))
        await asyncio.sleep(0.3)
        assert not full.done()
        any_one = await service.post("/decode?model=kl&preview=true", content=npy(latent()))
        assert any_one.headers["X-Preview"].startswith("linear")  # there is one in any case
    refused(await dropped, 429, "overloaded")
    Image.open(io.BytesIO((await full).content)).load()


async def test_a_linear_preview_of_a_model_with_alpha_shows_its_colours(rgba, tmp_path):
    shutil.copytree(rgba, tmp_path / "models")
    async with serving(tmp_path / "models") as service:
        shown = picture_of(await fitted(service, "/decode?preview=linear", latent(1, 16, 4, 5)))
        assert (shown.mode, shown.size) == ("RGB", (5, 4))
