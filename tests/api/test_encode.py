import asyncio
import io
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from app.execution.primitive import Whole
from app.store.checkpoint import load_autoencoder
from app.wire.arrays.latents import read_latents
from app.wire.headers import read_header
from app.wire.images import read_image
from tests.service import SIDE, array_of, latent, npy, picture, pixels, refused, serving, until

NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/x-safetensors"


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl") as service:
        yield service


def form(*pictures):
    return [("image", (f"{index}.png", body)) for index, body in enumerate(pictures)]


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def metadata_of(body: bytes) -> dict[str, str]:
    length = int.from_bytes(body[:8], "little")
    metadata: dict[str, str] = json.loads(body[8 : 8 + length])["__metadata__"]
    return metadata


async def test_a_picture_becomes_float16_npy_and_the_headers_say_how(service):
    answer = await service.post("/encode", content=picture(), headers={"X-Request-Id": "a-1"})
    latents = array_of(answer)
    assert latents.dtype == np.float16
    assert latents.shape == (1, 4, SIDE // 8, SIDE // 8)
    headers = answer.headers
    assert headers["content-type"] == NPY
    row = (await service.get("/models/kl")).json()
    assert headers["X-Model"] == "kl"
    assert headers["X-Model-SHA256"] == row["sha256"]
    assert headers["X-Plan"] == "fp32/whole"
    assert "X-Plan-Reason" not in headers
    assert headers["X-Latents"] == "scaled"
    assert headers["X-Latents-Family"] == "sd1"
    assert headers["X-Image-Size"] == f"{SIDE}x{SIDE}"
    assert headers["X-Request-Id"] == "a-1"
    stages = dict(part.split(";dur=") for part in headers["Server-Timing"].split(", "))
    assert list(stages) == ["read", "queue", "load", "compute", "write"]
    assert all(float(ms) >= 0 for ms in stages.values())
    assert float(stages["compute"]) > 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "AVIF"])
@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "image/gif"])
async def test_the_format_is_sniffed_whatever_the_content_type_says(service, kind, content_type):
    answer = await service.post("/encode", content=picture(kind=kind), headers={"Content-Type": content_type})
    assert array_of(answer).shape == (1, 4, SIDE // 8, SIDE // 8)


async def test_a_form_of_one_picture_is_that_picture(service):
    raw = await service.post("/encode", content=picture())
    formed = await service.post("/encode", files=form(picture()))
    assert formed.content == raw.content


async def test_a_part_without_a_file_name_keeps_its_bytes(service):
    body = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + picture() + b"\r\n--b--\r\n"
    headers = {"Content-Type": "Multipart/Form-Data; boundary=b"}
    answer = await service.post("/encode", content=body, headers=headers)
    assert answer.content == (await service.post("/encode", content=picture())).content


async def test_pictures_of_one_size_become_one_batch_in_order(service):
    first, second = picture(seed=1), picture(seed=2)
    latents = array_of(await service.post("/encode", files=form(first, second)))
    assert latents.shape == (2, 4, SIDE // 8, SIDE // 8)
    for index, body in enumerate((first, second)):
        alone = array_of(await service.post("/encode", content=body))
        np.testing.assert_allclose(latents[index], alone[0], atol=2e-3)


async def test_pictures_of_different_sizes_become_npz(service):
    answer = await service.post("/encode", files=form(picture(), picture(SIDE * 2, SIDE)))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == NPZ
    assert answer.headers["X-Image-Size"] == f"{SIDE}x{SIDE}, {SIDE * 2}x{SIDE}"
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert [array.shape for array in arrays.values()] == [(1, 4, 4, 4), (1, 4, 4, 8)]
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    asked = await service.post("/encode", files=form(picture(), picture(64, 32)), headers={"Accept": NPY})
    assert NPZ in refused(asked, 406, "not_acceptable")


async def test_npz_can_be_asked_for(service):
    answer = await service.post("/encode", content=picture(), headers={"Accept": NPZ})
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert [array.shape for array in arrays.values()] == [(1, 4, 4, 4)]


async def test_safetensors_says_what_it_holds(service):
    answer = await service.post("/encode", content=picture(30, 25), headers={"Accept": SAFETENSORS})
    assert answer.headers["content-type"] == SAFETENSORS
    assert metadata_of(answer.content) == {
        "model": "kl",
        "sha256": answer.headers["X-Model-SHA256"],
        "family": "sd1",
        "convention": "scaled",
        "image_size": "30x25",
        "image_fit": "pad",
    }


async def test_safetensors_lists_sizes_that_differ(service):
    files = form(picture(30, 25), picture(31, 26))
    answer = await service.post("/encode", files=files, headers={"Accept": SAFETENSORS})
    assert answer.headers["X-Image-Size"] == metadata_of(answer.content)["image_size"] == "30x25, 31x26"


@pytest.mark.parametrize(
    ("query", "size", "fit", "offset"),
    [
        ("", (35, 33), "pad", None),
        ("fit=resize", (35, 33), "resize", None),
        ("fit=crop", (35, 33), "crop", "1,0"),
        ("fit=crop", (SIDE, SIDE), None, None),  # nothing had to change
        ("fit=error", (SIDE, SIDE), None, None),
    ],
)
async def test_headers_and_file_say_what_a_decode_needs_to_come_back(service, query, size, fit, offset):
    answer = await service.post(f"/encode?{query}", content=picture(*size), headers={"Accept": SAFETENSORS})
    metadata = metadata_of(answer.content)
    for key, said in (("Size", f"{size[0]}x{size[1]}"), ("Fit", fit), ("Offset", offset)):
        assert answer.headers.get(f"X-Image-{key}") == metadata.get(f"image_{key.lower()}") == said


async def test_raw_latents_are_unscaled(service):
    scaled = array_of(await service.post("/encode?latents=scaled", content=picture()))
    answer = await service.post("/encode?latents=raw", content=picture())
    assert answer.headers["X-Latents"] == "raw"
    np.testing.assert_allclose(array_of(answer) * 0.18215, scaled, rtol=2e-3, atol=1e-3)


async def test_a_sample_is_repeatable_by_its_seed_alone(service):
    async def sample(query):
        return (await service.post(f"/encode?{query}", content=picture())).content

    mode, explicit = await sample(""), await sample("posterior=mode")
    first, again = await sample("posterior=sample&seed=7"), await sample("posterior=sample&seed=7")
    other, unseeded = await sample("posterior=sample&seed=8"), await sample("posterior=sample")
    assert mode == explicit
    assert first == again
    assert len({mode, first, other, unseeded}) == 4


async def test_deterministic_is_repeatable(service):
    answers = [await service.post("/encode?deterministic=true", content=picture()) for _ in range(2)]
    assert answers[0].status_code == 200
    assert answers[0].content == answers[1].content


@pytest.mark.parametrize(
    ("query", "plan", "reason"),
    [
        ("precision=fp32", "fp32/whole", None),  # the first choice anyway
        ("precision=bf16", "bf16/whole", "requested"),
        ("tiling=always", "fp32/strips", "requested"),
        ("tiling=never", "fp32/whole", None),
        ("precision=auto&tiling=auto", "fp32/whole", None),
    ],
)
async def test_precision_and_tiling_are_honoured(service, query, plan, reason):
    answer = await service.post(f"/encode?{query}", content=picture())
    assert answer.status_code == 200, answer.text
    assert (answer.headers["X-Plan"], answer.headers.get("X-Plan-Reason")) == (plan, reason)


@pytest.mark.parametrize(("mode", "side"), [("pad", 5), ("crop", 4), ("resize", 4)])
async def test_odd_sizes_are_made_to_fit(service, mode, side):
    answer = await service.post(f"/encode?fit={mode}", content=picture(35, 33))
    assert array_of(answer).shape == (1, 4, 5 if mode == "pad" else 4, side)
    assert answer.headers["X-Image-Size"] == "35x33"


async def test_the_padding_repeats_the_edge_and_is_the_default(service):
    padded = np.pad(pixels(35, 33), ((0, 7), (0, 5), (0, 0)), mode="edge")
    by_hand = array_of(await service.post("/encode", content=png(padded)))
    np.testing.assert_array_equal(array_of(await service.post("/encode", content=picture(35, 33))), by_hand)


async def test_odd_sizes_can_be_refused(service):
    answer = await service.post("/encode?fit=error", content=picture(35, 33))
    assert "35x33" in refused(answer, 422, "invalid_image")


async def test_the_background_shows_through_alpha_and_is_white_by_default(service):
    clear = png(np.zeros((SIDE, SIDE, 4), np.uint8))
    for query, colour in (("", (255, 255, 255)), ("?background=ff8000", (255, 128, 0))):
        flat = png(np.full((SIDE, SIDE, 3), colour, np.uint8))
        seen = array_of(await service.post(f"/encode{query}", content=clear))
        np.testing.assert_array_equal(seen, array_of(await service.post("/encode", content=flat)))


@pytest.mark.parametrize(
    "query",
    [
        "latents=half",
        "posterior=mean",
        "dtype=uint8",
        "seed=-1",
        "seed=9223372036854775808",
        "seed=x",
        "fit=stretch",
        "background=white",
        "background=%23ffffff",
        "background=fffff",
        "precision=fp8",
        "tiling=yes",
        "deterministic=perhaps",
        "model=",
        "size=32x32",  # a parameter of /decode
        "quality=90",
        "Model=kl",
        "unknown=1",
        "%00=1",
        "seed=1&seed=2",
    ],
)
async def test_parameters_out_of_range_or_unknown_are_refused_by_name(service, query):
    detail = refused(await service.post(f"/encode?{query}", content=picture()), 422, "invalid_parameter")
    assert query.partition("=")[0].replace("%00", r"\x00") in detail


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (picture()[:-30], 400, "malformed_body"),
        (picture()[:20], 400, "malformed_body"),
        (b"this is no picture", 415, "unsupported_media"),
        (b"", 415, "unsupported_media"),
        (npy(latent()), 422, "invalid_image"),  # an array, but of four channels
        (npy(np.full((3, SIDE, SIDE), np.nan, np.float32)), 422, "invalid_image"),
        (npy(pixels())[:-1], 400, "malformed_body"),
        (b"GIF89a" + bytes(100), 415, "unsupported_media"),
    ],
)
async def test_what_is_no_picture_is_refused_and_the_service_goes_on(service, body, status, code):
    refused(await service.post("/encode", content=body), status, code)
    array_of(await service.post("/encode", content=picture()))


async def test_one_bad_picture_of_a_form_is_the_requests_own_fault(service):
    refused(await service.post("/encode", files=form(picture(), b"no")), 415, "unsupported_media")


async def test_accept_is_honoured_and_weighed_over_several_headers(service):
    headers = [("Accept", f"{NPY};q=0.1"), ("Accept", SAFETENSORS)]
    answer = await service.post("/encode", content=picture(), headers=headers)
    assert answer.headers["content-type"] == SAFETENSORS
    nothing = await service.post("/encode", content=picture(), headers={"Accept": "text/html"})
    assert NPY in refused(nothing, 406, "not_acceptable")


async def test_a_tiny_model_encodes_too(service):
    answer = await service.post("/encode?model=tiny", content=picture())
    assert array_of(answer).shape == (1, 4, SIDE // 8, SIDE // 8)
    assert answer.headers["X-Model"] == "tiny"


def floats(*seeds: int) -> np.ndarray:
    """Pictures as diffusers has them: (N, 3, H, W), black -1, white 1."""
    return np.stack([pixels(seed=seed).transpose(2, 0, 1) / np.float32(127.5) - 1 for seed in seeds or (0,)])


def safetensors(array: np.ndarray, code: str) -> bytes:
    header = {"pixels": {"dtype": code, "shape": array.shape, "data_offsets": [0, array.nbytes]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + array.tobytes()


async def network_of(service, model: str, pictures: np.ndarray) -> np.ndarray:
    """What the encoder itself makes of floats (N, 3, H, W) in its own range."""
    checkpoint = await service.engine.resolve(model)
    module = load_autoencoder(checkpoint, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        moments: np.ndarray = module.encode(Whole(), torch.tensor(pictures)).numpy()
        return moments


async def test_an_array_of_bytes_is_the_same_pictures(service):
    batch = np.stack([pixels(seed=1), pixels(seed=2)])
    expected = await service.post("/encode", files=form(picture(seed=1), picture(seed=2)))
    for body in (npy(batch), safetensors(batch, "U8")):
        answer = await service.post("/encode", content=body)
        assert (answer.status_code, answer.headers["X-Image-Size"]) == (200, f"{SIDE}x{SIDE}")
        np.testing.assert_allclose(array_of(answer), array_of(expected), atol=2e-3)
    mixed = await service.post("/encode", files=form(npy(batch), picture(seed=3)))
    assert array_of(mixed).shape == (3, 4, 4, 4)


@pytest.mark.parametrize(("model", "family_range"), [("kl", (-1, 1)), ("tiny", (0, 1))])
async def test_floats_go_into_the_network_without_rounding(service, model, family_range):
    low, high = family_range
    given = floats(1, 2) * 0.7317  # between the levels of bytes
    query = f"/encode?model={model}&posterior=moments&dtype=float32"
    expected = await network_of(service, model, given * (high - low) / 2 + (high + low) / 2)
    for body in (npy(given), safetensors(given, "F32")):
        np.testing.assert_allclose(array_of(await service.post(query, content=body)), expected, rtol=1e-4, atol=1e-4)
    half = array_of(await service.post(query, content=npy(given.astype(np.float16))))
    np.testing.assert_allclose(half, expected, atol=0.02)
    one = array_of(await service.post(query, content=npy(given[0])))
    np.testing.assert_allclose(one, expected[:1], rtol=1e-4, atol=1e-4)


async def test_floats_and_bytes_of_one_form_share_no_forward_and_come_out_alike(service):
    answer = await service.post("/encode", files=form(picture(seed=1), npy(floats(1)), npy(floats(2)[0])))
    latents = array_of(answer)
    np.testing.assert_allclose(latents[0], latents[1], atol=2e-3)
    assert np.abs(latents[1] - latents[2]).max() > 0.01


async def test_floats_of_odd_sizes_are_made_to_fit(service):
    given = npy(pixels(35, 33).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    for query in ("fit=pad", "fit=crop", "fit=resize"):
        answer = await service.post(f"/encode?{query}", content=given)
        expected = await service.post(f"/encode?{query}", content=picture(35, 33))
        np.testing.assert_allclose(array_of(answer), array_of(expected), atol=0.02)
        for header in ("X-Image-Size", "X-Image-Fit", "X-Image-Offset"):
            assert answer.headers.get(header) == expected.headers.get(header)
    assert "35x33" in refused(await service.post("/encode?fit=error", content=given), 422, "invalid_image")


@pytest.mark.parametrize(("model", "posterior", "channels"), [("kl", "gaussian", 8), ("tiny", "point", 4)])
async def test_moments_are_what_the_network_says_and_the_headers_say_of_what(service, model, posterior, channels):
    query = f"/encode?model={model}&posterior=moments"
    answer = await service.post(query, content=picture())
    moments = array_of(answer)
    assert (moments.shape, moments.dtype) == ((1, channels, 4, 4), np.dtype(np.float16))
    assert (answer.headers["X-Posterior"], answer.headers["X-Latents"]) == (posterior, "raw")
    wide = array_of(await service.post(f"{query}&dtype=float32&latents=raw", content=picture()))
    np.testing.assert_array_equal(wide.astype(np.float16), moments)
    mode = array_of(await service.post(f"/encode?model={model}&latents=raw&dtype=float32", content=picture()))
    np.testing.assert_array_equal(wide[:, :4], mode)
    assert "X-Posterior" not in (await service.post(f"/encode?model={model}", content=picture())).headers


async def test_a_draw_from_moments_is_the_draw_that_the_service_makes(service):
    moments = array_of(await service.post("/encode?posterior=moments&dtype=float32", content=picture()))
    mean, logvar = np.split(moments[0], 2)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(5))[0].numpy()
    query = "/encode?posterior=sample&seed=5&latents=raw&dtype=float32"
    drawn = array_of(await service.post(query, content=picture()))[0]
    np.testing.assert_allclose(drawn, mean + np.exp(logvar.clip(-30, 20) / 2) * noise, rtol=1e-5, atol=1e-5)


async def test_moments_are_raw_whatever_is_asked(service):
    answer = await service.post("/encode?posterior=moments&latents=scaled", content=picture())
    assert "raw" in refused(answer, 422, "invalid_parameter")


async def test_moments_in_safetensors_say_what_they_are(service):
    answer = await service.post("/encode?posterior=moments", content=picture(), headers={"Accept": SAFETENSORS})
    said = metadata_of(answer.content)
    assert (said["posterior"], said["convention"]) == ("gaussian", "raw")


@pytest.mark.parametrize("accept", [NPY, SAFETENSORS])
async def test_latents_may_be_float32(service, accept):
    async def latents(query):
        body = (await service.post(f"/encode?{query}", content=picture(), headers={"Accept": accept})).content
        return np.stack(read_latents(body, max_bytes=1 << 20).items)

    wide, half = await latents("dtype=float32"), await latents("dtype=float16")
    assert (wide.dtype, half.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(wide.astype(np.float16), half)
    assert (wide != half).any()


def animated(kind: str, frames: int = 3) -> bytes:
    file = io.BytesIO()
    others = [Image.fromarray(pixels(seed=seed)) for seed in range(1, frames)]
    Image.fromarray(pixels()).save(file, kind, save_all=True, append_images=others, lossless=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WebP", "AVIF"])
async def test_the_first_frame_of_an_animation_is_encoded_with_a_warning(service, kind):
    answer = await service.post("/encode", content=animated(kind))
    assert answer.headers["X-Warning"].endswith("the picture has 3 frames: the first is encoded")
    still = await service.post("/encode", content=picture())
    assert "frames" not in still.headers.get("X-Warning", "")
    np.testing.assert_allclose(array_of(answer), array_of(still), atol=2e-3)
    formed = await service.post("/encode", files=form(picture(), animated(kind), *[animated(kind)] * 5))
    said = formed.headers["X-Warning"]
    assert "part 1 (1.png) has 3 frames: the first is encoded; part 2 (2.png) has" in said
    assert said.endswith("; ..")


@pytest.mark.parametrize(
    ("bad", "status", "code", "query"),
    [
        (b"no picture", 415, "unsupported_media", ""),
        (picture()[:-30], 400, "malformed_body", ""),
        (picture(SIDE + 1, SIDE), 422, "invalid_image", "?fit=error"),
        (picture(3, 3), 422, "invalid_image", "?fit=crop"),
    ],
)
async def test_an_error_names_the_part_that_it_is_about(service, bad, status, code, query):
    answer = await service.post(f"/encode{query}", files=form(picture(), picture(), bad))
    assert refused(answer, status, code).startswith("part 2 (2.png): ")
    alone = await service.post(f"/encode{query}", content=bad)
    assert "part" not in refused(alone, status, code)


async def test_a_part_that_is_too_large_is_named(models):
    async with serving(models, default_model="kl", max_pixels=SIDE * SIDE) as service:
        answer = await service.post("/encode", files=form(picture(), picture(SIDE, SIDE + 1)))
        assert refused(answer, 413, "too_large").startswith("part 1 (1.png): ")


@pytest.fixture
def reading(monkeypatch):
    """Holds every decoder until its gate opens; how many there are at once."""
    gate, at_once = threading.Event(), []

    def hold(*arguments, **options):
        at_once.append(1)
        assert gate.wait(60)
        return read_image(*arguments, **options)

    monkeypatch.setattr("app.wire.pixels.read_image", hold)
    yield gate, at_once
    gate.set()


async def test_small_work_waits_for_no_decoder(service, reading):
    gate, at_once = reading
    waiting = [asyncio.ensure_future(service.post("/encode", content=picture())) for _ in range(60)]
    await until(lambda: len(at_once) >= (os.cpu_count() or 1))
    refused(await service.post("/encode", content=b"no picture"), 415, "unsupported_media")
    assert (await service.get("/models/kl/plan")).status_code == 200
    assert (await service.get("/models")).status_code == 200
    for request in waiting[30:]:
        request.cancel()
    await asyncio.wait(waiting[30:])
    gate.set()
    assert {(await request).status_code for request in waiting[:30]} == {200}
    assert len(at_once) == 30  # what nobody waits for any more has not begun


async def test_pictures_are_decoded_as_many_at_once_as_there_is_memory(models, reading):
    gate, at_once = reading
    work = read_header(picture()).work
    async with serving(models, default_model="kl", buffer_bytes=work + 20_000) as service:
        room = service.app.state.context.room
        waiting = [asyncio.ensure_future(service.post("/encode", content=picture())) for _ in range(3)]
        await until(lambda: len(at_once) == 1 and room.used >= work)
        assert room.used < room.total
        assert (await service.get("/models/kl/plan")).status_code == 200
        assert len(at_once) == 1
        gate.set()
        assert {(await request).status_code for request in waiting} == {200}
        await until(lambda: room.used == 0)


# --------------------------------------------------------------------------------------------------------------- alpha


@pytest.fixture(scope="module")
async def layered(rgba):
    async with serving(rgba) as service:
        yield service


def see_through(width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """uint8 (H, W, 4)."""
    return np.dstack([pixels(width, height), pixels(width, height, seed=1)[..., 0]])


async def test_alpha_goes_into_the_network_where_it_takes_it(layered):
    array = see_through(40, 35)
    found = array_of(await layered.post("/encode?dtype=float32", content=png(array)))
    assert found.shape == (1, 16, 5, 5)
    floats = (array[..., :4].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
    for body in (npy(array), npy(floats)):
        same = array_of(await layered.post("/encode?dtype=float32", content=body))
        np.testing.assert_allclose(same, found, atol=1e-5)
    other = array.copy()
    other[..., 3] = 255 - other[..., 3]
    assert np.abs(array_of(await layered.post("/encode", content=npy(other))) - found).max() > 1e-3


async def test_a_picture_without_alpha_is_opaque(layered):
    array = pixels()
    opaque = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    expected = array_of(await layered.post("/encode?dtype=float32", content=npy(opaque)))
    floats = npy((array.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1))
    for body in (png(array), npy(array), floats, png(opaque)):
        found = array_of(await layered.post("/encode?dtype=float32", content=body))
        np.testing.assert_allclose(found, expected, atol=1e-5)


async def test_a_background_is_for_models_that_take_no_alpha(layered):
    answer = await layered.post("/encode?background=000000", content=picture())
    assert "layered takes the alpha itself" in refused(answer, 422, "invalid_parameter")


async def test_an_array_with_alpha_is_refused_where_it_is_not_taken(service):
    answer = await service.post("/encode?model=kl", content=npy(see_through()))
    assert "expected 3 channels, got 4" in refused(answer, 422, "invalid_image")
