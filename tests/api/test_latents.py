import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from app.api.latents import convention_of, warning
from app.api.queries import DecodeQuery
from app.vae.families import FAMILIES
from app.vae.latent_format import LatentFormat
from app.wire.arrays.latents import LatentShape
from app.wire.arrays.npz import write_npz
from app.wire.arrays.tensors import write_safetensors
from tests.service import array_of, latent, npy, picture, picture_of, refused, serving
from tests.store.hostile import CORPUS

PNG, NPY, SAFETENSORS = "image/png", "application/x-npy", "application/x-safetensors"
ASTRONAUT = Path(__file__).resolve().parents[1] / "pictures" / "astronaut.png"


@pytest.fixture(scope="module")
async def service(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settled")  # a guessed family would be a warning of its own
    shutil.copytree(models / "VAE", folder / "VAE")
    (folder / "VAE" / "kl.json").write_text('{"family": "sd1"}')
    async with serving(folder, default_model="kl") as service:
        yield service


def noise(channels: int = 4, std: float = 1.0, side: int = 32, dtype: type = np.float16) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((channels, side, side))
    return (values * std).astype(dtype)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def flat(*levels: float, side: int = 16) -> np.ndarray:
    """A picture of one colour, with the little that its borders add."""
    grain = np.random.default_rng(0).standard_normal((len(levels), side, side)) * 0.03
    return (np.array(levels)[:, None, None] + grain).astype(np.float16)


# --------------------------------------------------------------------------------------------------------- family


@pytest.mark.parametrize("said", ["sdxl", "flux", "taesd", "latentd-small", "custom"])
async def test_a_header_of_another_family_is_a_conflict_that_names_both(service, said):
    answer = await service.post("/decode", content=npy(latent()), headers={"X-Latents-Family": said})
    detail = refused(answer, 409, "family_mismatch")
    assert said in detail
    assert "sd1" in detail


@pytest.mark.parametrize("said", ["sd1", "sd2"])
async def test_a_header_of_the_same_latent_space_is_fine(service, said):
    for body in (npy(latent()), write_npz([latent()])):
        picture_of(await service.post("/decode", content=body, headers={"X-Latents-Family": said}))


@pytest.mark.parametrize("said", ["", "sd15", "SD1", "sd1, sdxl", "ü", "a" * 5000])
async def test_a_header_that_is_no_family_is_refused_with_the_list(service, said):
    headers = [("X-Latents-Family", said.encode())]
    detail = refused(await service.post("/decode", content=npy(latent()), headers=headers), 422, "invalid_parameter")
    assert all(name in detail for name in (*FAMILIES, "custom"))
    assert len(detail) < 400


async def test_a_header_twice_must_not_contradict_itself(service):
    twice = [("X-Latents-Family", "sd1"), ("X-Latents-Family", "sd1")]
    picture_of(await service.post("/decode", content=npy(latent()), headers=twice))
    refused(
        await service.post("/decode", content=npy(latent()), headers=[*twice, ("X-Latents-Family", "sdxl")]),
        422,
        "invalid_parameter",
    )


async def test_a_header_must_not_contradict_the_file(service):
    body = write_safetensors(latent(), {"family": "sd1"})
    picture_of(await service.post("/decode", content=body, headers={"X-Latents-Family": "sd1"}))
    answer = await service.post("/decode", content=body, headers={"X-Latents-Family": "sd2"})
    detail = refused(answer, 422, "invalid_parameter")
    assert "sd1" in detail
    assert "sd2" in detail


@pytest.mark.parametrize(("family", "told"), [("\ud800", r"\ud800"), ("a\r\nb", r"a\r\nb")])
async def test_a_family_of_strange_characters_is_told_in_one_line(service, family, told):
    answer = await service.post("/decode", content=write_safetensors(latent(), {"family": family}))
    detail = refused(answer, 409, "family_mismatch")
    assert f"family {told} " in detail


async def test_a_family_that_nobody_knows_is_a_conflict_too(service):
    body = write_safetensors(latent(), {"family": "x" * 9000})
    detail = refused(await service.post("/decode", content=body), 409, "family_mismatch")
    assert "sd1" in detail
    assert len(detail) < 300


async def test_a_tiny_decoder_shows_the_scaled_latents_of_its_full_family_and_of_no_other(service):
    headers = {"Accept": SAFETENSORS}
    scaled = (await service.post("/encode?model=kl", content=picture(), headers=headers)).content
    picture_of(await service.post("/decode?model=tiny", content=scaled))
    raw = (await service.post("/encode?model=kl&latents=raw", content=picture(), headers=headers)).content
    detail = refused(await service.post("/decode?model=tiny", content=raw), 409, "family_mismatch")
    assert "raw" in detail
    other = write_safetensors(latent(), {"family": "sdxl", "convention": "scaled"})
    refused(await service.post("/decode?model=tiny", content=other), 409, "family_mismatch")


async def test_other_weights_of_the_family_are_allowed(service):
    body = write_safetensors(latent(), {"family": "sd1", "sha256": "0" * 64, "model": "another"})
    picture_of(await service.post("/decode", content=body))


# --------------------------------------------------------------------------------------------- files of other programs


def cached(*arrays: np.ndarray) -> bytes:
    """What sd-scripts keeps of a picture."""
    file = io.BytesIO()
    kept = {f"latents_{array.shape[1]}x{array.shape[2]}": array.astype(np.float32) for array in arrays}
    sizes = {name.replace("latents", "original_size"): np.array((640, 427)) for name in kept}
    np.savez(file, **kept, **sizes, **{name.replace("latents", "latents_flipped"): kept[name] for name in kept})  # type: ignore[arg-type]
    return file.getvalue()


def torch_saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


async def test_a_cache_of_a_trainer_is_raw_unless_the_query_says_otherwise(service):
    values = latent()[0]
    for query, same in (("", "latents=raw"), ("?latents=scaled", "latents=scaled")):
        answer = await service.post(f"/decode{query}", content=cached(values), headers={"Accept": NPY})
        expected = await service.post(f"/decode?{same}", content=npy(values), headers={"Accept": NPY})
        np.testing.assert_array_equal(array_of(answer), array_of(expected))
        assert answer.headers["X-Latents"] == same.removeprefix("latents=")


async def test_resolutions_of_a_cache_are_pictures(service):
    body = cached(latent()[0], latent(4, 4, 6))
    answer = await service.post("/decode", content=body)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        sizes = [Image.open(io.BytesIO(archive.read(name))).size for name in archive.namelist()]
    assert sizes == [(32, 32), (48, 32)]


async def test_a_tiny_decoder_takes_no_raw_cache(service):
    detail = refused(await service.post("/decode?model=tiny", content=cached(latent()[0])), 409, "family_mismatch")
    assert "caches of sd-scripts hold raw latents" in detail
    picture_of(await service.post("/decode?model=tiny&latents=scaled", content=cached(latent()[0])))


def test_which_caches_are_scaled():
    header = LatentShape(((1, 16, 4, 4),), "float32", cached=True)
    found = {name: row.cached for name, row in FAMILIES.items()}
    assert {name for name in found if found[name] == "scaled"} == {"flux", "taef1"}
    for name in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        assert convention_of(DecodeQuery(), header, FAMILIES[name]) == found[name]
        assert convention_of(DecodeQuery(), replace(header, cached=False), FAMILIES[name]) == "scaled"


@pytest.mark.parametrize(
    ("marker", "convention"), [({"latent_format_version_0": torch.tensor([])}, "raw"), ({}, "scaled")]
)
async def test_a_latent_of_comfyui_is_what_its_marker_says(service, marker, convention):
    body = safetensors.torch.save({"latent_tensor": torch.from_numpy(latent(dtype=np.float32)), **marker})
    answer = await service.post("/decode", content=body, headers={"Accept": NPY})
    plain = npy(latent(dtype=np.float32))
    expected = await service.post(f"/decode?latents={convention}", content=plain, headers={"Accept": NPY})
    np.testing.assert_array_equal(array_of(answer), array_of(expected))
    assert answer.headers["X-Latents"] == convention
    other = {"raw": "scaled", "scaled": "raw"}[convention]
    refused(await service.post(f"/decode?latents={other}", content=body), 422, "invalid_parameter")


async def test_what_torch_saved_is_decoded_as_the_query_and_the_header_say(service):
    values = torch.from_numpy(latent(dtype=np.float32))
    for query in ("latents=scaled", "latents=raw"):
        for content in (values, values[0], [values], {"samples": values}):
            body = torch_saved(content)
            answer = await service.post(f"/decode?{query}", content=body, headers={"Accept": NPY})
            expected = await service.post(f"/decode?{query}", content=npy(values.numpy()), headers={"Accept": NPY})
            np.testing.assert_array_equal(array_of(answer), array_of(expected))
    said = {"X-Latents-Family": "sdxl"}
    refused(await service.post("/decode", content=torch_saved(values), headers=said), 409, "family_mismatch")


async def test_code_in_a_file_of_torch_is_refused_with_its_name(service):
    hostile = next(one for one in CORPUS if one.name == "os.system")
    assert "os.system" in refused(await service.post("/decode", content=hostile.build()), 400, "malformed_body")


# -------------------------------------------------------------------------------------------------------- warning


async def test_raw_latents_sent_as_scaled_are_decoded_and_warned_of(service):
    raw = npy(latent(1, 4, 16, 16) * np.float16(5.5))
    answer = await service.post("/decode", content=raw)
    picture_of(answer)
    text = answer.headers["X-Warning"]
    assert "scaled sd1 latents" in text
    assert "latents=raw" in text
    assert text.isascii()
    assert text.isprintable()
    right = await service.post("/decode?latents=raw", content=raw)
    assert "X-Warning" not in right.headers
    for media in (NPY, "application/zip", "image/jpeg"):
        answer = await service.post("/decode", content=raw, headers={"Accept": media})
        assert answer.headers["X-Warning"] == text


async def test_the_warning_names_the_items_of_a_batch(service):
    batch = np.concatenate([noise()[None], noise(std=6)[None], noise()[None], noise(std=0.1)[None]])
    answer = await service.post("/decode", content=npy(batch[:, :, :4, :4].copy()), headers={"Accept": NPY})
    assert answer.status_code == 200
    high, low = answer.headers["X-Warning"].split("; 1 of 4")
    assert "1 of 4 latents (index 1)" in high
    assert "(index 3)" in low
    assert "twice" in low


@pytest.mark.parametrize("convention", ["scaled", "raw"])
@pytest.mark.parametrize("name", FAMILIES)
def test_noise_of_the_right_size_never_warns(name, convention):
    row = FAMILIES[name]
    # Of raw latents with a factor for each channel the mean one: a warning has nothing to say of these.
    std = 1.0 if convention == "scaled" else float(np.mean(1 / np.asarray(row.latent_format.scaling_factor)))
    channels = row.latent_channels * (row.latent_format.patch**2 if convention == "scaled" else 1)
    items = [noise(channels, std * factor) for factor in (0.6, 1.0, 1.5)]
    assert warning(items, row, convention) is None


WAN_LATENTS = Path(__file__).parents[3] / "shared" / "latents" / "wan21_latents.pth"


@pytest.mark.skipif(not WAN_LATENTS.exists(), reason="the latents of a real clip are not here")
def test_latents_of_a_real_clip_never_warn_and_raw_ones_do():
    clip = torch.load(WAN_LATENTS, map_location="cpu", weights_only=True)[0].float().numpy()  # (C, T, h, w)
    row = FAMILIES["wan21"]
    frames = list(clip.transpose(1, 0, 2, 3))
    assert warning(frames, row, "scaled") is None
    form = row.latent_format
    scale, shift = (np.reshape(each, (-1, 1, 1)) for each in (form.scaling_factor, form.shift_factor))
    raw = [frame / scale + shift for frame in frames]
    assert "are they raw? latents=raw" in str(warning(raw[4:], row, "scaled"))


def test_raw_latents_of_numbers_per_channel_are_not_told(monkeypatch):
    row = replace(FAMILIES["sd1"], name="toy", latent_format=LatentFormat((1.0, 2.0, 3.0, 4.0), 0.0))
    monkeypatch.setitem(FAMILIES, "toy", row)
    assert warning([noise(4, 100)], row, "raw") is None
    assert "are they raw? latents=raw" in str(warning([noise(4, 100)], row, "scaled"))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "flux"])
@pytest.mark.parametrize("size", [0.85, 1.0, 1.2])  # of the scaled latents of ordinary pictures
def test_a_convention_too_many_or_too_few_is_seen(name, size):
    row = FAMILIES[name]
    form = row.latent_format
    scaled = noise(row.latent_channels, size, dtype=np.float32)
    raw = scaled / form.scaling_factor + form.shift_factor
    twice = (scaled - form.shift_factor) * form.scaling_factor
    assert "are they raw? latents=raw" in str(warning([raw], row, "scaled"))
    if (name, size) != ("flux", 1.2):  # 0.43: a calm picture's latents may be as small
        assert "scaled twice" in str(warning([twice], row, "scaled"))
        assert "are they scaled? latents=scaled" in str(warning([scaled], row, "raw"))
    assert warning([scaled], row, "scaled") is None
    assert warning([raw], row, "raw") is None


@pytest.mark.parametrize("levels", [(0.1, -0.1, 0.05, 0.2), (-2.8, 0.5, 0.3, 0.3), (3.5, -2.2, 2.4, -1.9)])
def test_flat_pictures_are_small_or_far_from_zero_and_never_warn(levels):
    for name in ("sd1", "sdxl", "latentd-small", "taesd"):
        assert warning([flat(*levels), np.zeros((4, 9, 9), np.float16)], FAMILIES[name], "scaled") is None


def test_families_whose_constants_are_one_get_no_advice_about_the_convention():
    for convention in ("scaled", "raw"):
        text = str(warning([noise(std=6)], FAMILIES["taesd"], convention))
        assert "of this family" in text
        assert "latents=" not in text


def test_what_cannot_be_judged_is_not():
    wild = [noise(32, 50)]
    assert warning(wild, FAMILIES["flux2"], "raw") is None  # unpacked, and the statistics are in the weights
    custom = replace(FAMILIES["sd1"], latent_format=replace(FAMILIES["sd1"].latent_format, scaling_factor=1.0))
    assert warning([noise(std=5.5)], custom, "scaled") is None
    assert warning([noise(std=5.5)], replace(FAMILIES["sd1"], name="custom"), "scaled") is None


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_the_largest_numbers_do_not_overflow(value):
    item = noise(dtype=np.float32)
    item[0, 0, 0] = value
    assert "at most" in str(warning([item], FAMILIES["sd1"], "scaled"))
    assert warning([np.full((4, 1, 1), value, np.float32)], FAMILIES["sd1"], "scaled") is None


def test_many_items_make_one_short_line():
    text = str(warning([noise(side=4, std=9)] * 200, FAMILIES["sd1"], "scaled"))
    assert "200 of 200 latents (index 0, 1, 2, 3, ..)" in text
    assert len(text) < 300


@pytest.mark.parametrize("side", [64, 128])
async def test_pictures_of_the_embedded_model_never_warn(side):
    """Its latents are scaled to unit variance, as those of the diffusion families are."""
    ordinary = [np.array(Image.open(ASTRONAUT).convert("RGB").resize((side, side)))]
    ordinary.append(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    colours = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]
    ordinary += [np.full((side, side, 3), colour, np.uint8) for colour in colours]
    async with serving(ASTRONAUT.parents[2] / "models") as service:
        answer = await service.post(
            "/encode", files=[("image", (str(i), png(each))) for i, each in enumerate(ordinary)]
        )
        back = await service.post("/decode", content=answer.content, headers={"Accept": NPY})
    assert back.status_code == 200
    assert "X-Warning" not in back.headers
    as_raw = [item * np.float32(5.5) for item in array_of(answer)[:1]]  # as if raw, of a family like SD 1.x
    assert warning(as_raw, FAMILIES["latentd-small"], "scaled") is not None
