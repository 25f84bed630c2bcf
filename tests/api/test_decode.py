import io
import json
import struct
import tracemalloc
import zipfile
from functools import partial
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from app.execution.primitive import Whole
from app.store.checkpoint import load_autoencoder
from app.wire.arrays.latents import read_latents
from app.wire.arrays.tensors import write_safetensors
from tests.service import SIDE, array_of, latent, npy, picture, picture_of, refused, serving

NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/x-safetensors"
PNG, JPEG, WEBP, AVIF, ZIP = "image/png", "image/jpeg", "image/webp", "image/avif", "application/zip"


def safetensors(body: bytes) -> np.ndarray:
    return np.stack(read_latents(body, max_bytes=1 << 20).items)


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl") as service:
        yield service


async def test_a_latent_becomes_a_png_and_the_headers_say_how(service):
    answer = await service.post("/decode", content=npy(latent()))
    image = picture_of(answer)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIDE, SIDE))
    headers = answer.headers
    assert headers["content-type"] == PNG
    assert headers["X-Model"] == "kl"
    assert len(headers["X-Model-SHA256"]) == 64
    assert headers["X-Plan"] == "fp32/whole"
    assert headers["X-Latents"] == "scaled"
    assert headers["X-Latents-Family"] == "sd1"
    assert headers["X-Image-Size"] == f"{SIDE}x{SIDE}"
    assert headers["X-Request-Id"]
    assert [part.split(";")[0] for part in headers["Server-Timing"].split(", ")] == [
        "read",
        "queue",
        "load",
        "compute",
        "write",
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 4, 4, 4)])
async def test_shapes_and_dtypes_of_npy(service, dtype, shape):
    image = picture_of(await service.post("/decode", content=npy(latent(*shape, dtype=dtype))))
    assert image.size == (SIDE, SIDE)


@pytest.mark.parametrize("tiling", ["never", "always"])
async def test_the_smallest_latent_there_is(service, tiling):
    """A map of one position, in a network of a channel a group."""
    answer = await service.post("/decode", params={"tiling": tiling}, content=npy(latent(1, 4, 1, 1)))
    assert picture_of(answer).size == (8, 8)


async def test_npz_and_safetensors_are_sniffed(service):
    file = io.BytesIO()
    np.savez(file, a=latent(seed=1), b=latent(seed=2))
    for body in (file.getvalue(), write_safetensors(np.concatenate([latent(seed=1), latent(seed=2)]), {})):
        headers = {"Accept": NPY, "Content-Type": "text/plain"}
        pictures = array_of(await service.post("/decode", content=body, headers=headers))
        assert pictures.shape == (2, SIDE, SIDE, 3)
        assert pictures.dtype == np.uint8


async def test_what_encode_writes_of_different_sizes_decode_reads(service):
    parts = [("image", ("a.png", picture(32, 32))), ("image", ("b.png", picture(64, 32, 1)))]
    encoded = await service.post("/encode", files=parts)
    assert encoded.headers["content-type"] == NPZ
    answer = await service.post("/decode", content=encoded.content, headers={"Accept": "*/*"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, ZIP)
    assert answer.headers["X-Image-Size"] == "32x32, 64x32"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        sizes = [Image.open(io.BytesIO(archive.read(name))).size for name in archive.namelist()]
    assert sizes == [(32, 32), (64, 32)]
    for accept in (PNG, NPY):  # pictures of two sizes are no array either
        told = refused(
            await service.post("/decode", content=encoded.content, headers={"Accept": accept}), 406, "not_acceptable"
        )
        assert ZIP in told
    small = await service.post("/decode?size=32x30", content=encoded.content)
    assert small.headers["X-Image-Size"] == "32x30"
    assert "32x32" in refused(
        await service.post("/decode?size=64x32", content=encoded.content), 422, "invalid_parameter"
    )


async def test_one_latent_that_does_not_fit_refuses_all(service):
    file = io.BytesIO()
    np.savez(file, a=latent(), b=latent(1, 16, 4, 4))
    assert "16" in refused(await service.post("/decode", content=file.getvalue()), 422, "invalid_latent")


async def test_a_guessed_family_is_told_on_use(service):
    for path, body in (("/encode", picture()), ("/decode", npy(latent()))):
        assert "the family sd1 is a guess" in unquote((await service.post(path, content=body)).headers["X-Warning"])
        assert "X-Warning" not in (await service.post(f"{path}?model=tiny", content=body)).headers


async def test_bfloat16_in_safetensors(service):
    values = np.full((1, 4, 4, 4), 0.5, np.float32)
    header = {"latents": {"dtype": "BF16", "shape": [1, 4, 4, 4], "data_offsets": [0, 128]}}
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    answer = await service.post("/decode", content=body)
    assert answer.content == (await service.post("/decode", content=npy(values))).content


@pytest.mark.parametrize(("media", "kind"), [(PNG, "PNG"), (JPEG, "JPEG"), (WEBP, "WEBP"), (AVIF, "AVIF")])
async def test_picture_types(service, media, kind):
    answer = await service.post("/decode", content=npy(latent()), headers={"Accept": media})
    assert answer.headers["content-type"] == media
    assert picture_of(answer).format == kind


async def test_png_and_npy_hold_the_same_pixels(service):
    array = array_of(await service.post("/decode", content=npy(latent()), headers={"Accept": NPY}))
    assert array.shape == (1, SIDE, SIDE, 3)
    assert array.dtype == np.uint8
    image = picture_of(await service.post("/decode", content=npy(latent())))
    np.testing.assert_array_equal(np.asarray(image), array[0])


async def test_several_pictures_come_as_zip(service):
    batch = latent(2, 4, 4, 4)
    for accept in (ZIP, "*/*"):
        answer = await service.post("/decode", content=npy(batch), headers={"Accept": accept})
        assert answer.headers["content-type"] == ZIP
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            images = [Image.open(archive.open(name)) for name in sorted(archive.namelist())]
            assert [(image.format, image.size) for image in images] == [("PNG", (SIDE, SIDE))] * 2
            for image, one in zip(images, batch, strict=True):
                alone = picture_of(await service.post("/decode", content=npy(one)))
                difference = np.asarray(image).astype(int) - np.asarray(alone)
                assert abs(difference).max() <= 1


@pytest.mark.parametrize("accept", [PNG, JPEG, f"{WEBP}, {PNG}", "image/*"])
async def test_several_pictures_do_not_fit_in_one(service, accept):
    answer = await service.post("/decode", content=npy(latent(2, 4, 4, 4)), headers={"Accept": accept})
    detail = refused(answer, 406, "not_acceptable")
    assert ZIP in detail
    assert NPY in detail


async def test_a_refused_type_is_passed_over(service):
    headers = {"Accept": "image/png;q=0, */*"}
    answer = await service.post("/decode", content=npy(latent()), headers=headers)
    assert answer.headers["content-type"] == JPEG


async def test_size_crops_the_padding_away(service):
    encoded = await service.post("/encode", content=picture(35, 33))
    answer = await service.post("/decode", content=encoded.content, params={"size": encoded.headers["X-Image-Size"]})
    assert picture_of(answer).size == (35, 33)
    assert answer.headers["X-Image-Size"] == "35x33"
    whole = await service.post("/decode", content=encoded.content)
    np.testing.assert_array_equal(np.asarray(picture_of(answer)), np.asarray(picture_of(whole))[:33, :35])


@pytest.mark.parametrize("accept", [NPY, SAFETENSORS])
@pytest.mark.parametrize("fit", ["pad", "resize", "crop"])
async def test_what_encode_said_leads_back_to_the_picture(service, fit, accept):
    encoded = await service.post(f"/encode?fit={fit}", content=picture(35, 29), headers={"Accept": accept})
    headers = encoded.headers
    back = {"size": headers["X-Image-Size"], "fit": headers["X-Image-Fit"], "offset": headers.get("X-Image-Offset")}
    query = {name: value for name, value in back.items() if value} if accept == NPY else {}  # the file says it itself
    answer = await service.post("/decode", content=encoded.content, params=query)
    plain = await service.post("/decode", content=npy(safetensors(encoded.content) if not query else array_of(encoded)))
    decoded = picture_of(plain)
    if fit == "crop":  # what is gone cannot come back: the answer is the part, and says so
        assert (answer.headers["X-Image-Size"], answer.headers["X-Image-Fit"]) == ("32x24", "crop")
        assert answer.headers["X-Image-Offset"] == "1,2"
        expected = decoded
    else:
        assert answer.headers["X-Image-Size"] == "35x29"
        assert not {"x-image-fit", "x-image-offset"} & set(answer.headers)
        box = (0, 0, 35, 29)
        expected = decoded.crop(box) if fit == "pad" else decoded.resize((35, 29), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(picture_of(answer)), np.asarray(expected))


async def test_the_query_overrules_what_the_file_says_of_its_size(service):
    async def decoded(latents, **query):
        return await service.post("/decode", content=latents, params=query)

    padded = (await service.post("/encode", content=picture(35, 29), headers={"Accept": SAFETENSORS})).content
    assert picture_of(await decoded(padded, size="40x32")).size == (40, 32)
    resized = await service.post("/encode?fit=resize", content=picture(35, 29), headers={"Accept": SAFETENSORS})
    assert picture_of(await decoded(resized.content, size="20x30", fit="pad")).size == (20, 30)
    refused(await decoded(resized.content, size="20x30"), 422, "invalid_parameter")
    refused(await decoded(resized.content, fit="crop", size="20x30"), 422, "invalid_parameter")
    refused(await decoded(resized.content, fit="pad"), 422, "invalid_parameter")


async def test_a_file_whose_size_is_not_its_own_is_decoded_with_a_warning(service):
    for metadata in ({"image_size": "64x64"}, {"image_size": "30x30, 31x31"}, {"image_size": "8x8"}):
        answer = await service.post("/decode", content=write_safetensors(latent(), metadata))
        assert picture_of(answer).size == (SIDE, SIDE)
        assert "left as decoded" in answer.headers["X-Warning"]


async def test_a_batch_of_sizes_comes_back_as_each_was(service):
    files = [("image", ("a.png", picture(30, 25))), ("image", ("b.png", picture(31, 26)))]
    encoded = await service.post("/encode", files=files, headers={"Accept": SAFETENSORS})
    answer = await service.post("/decode", content=encoded.content)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert [Image.open(archive.open(name)).size for name in archive.namelist()] == [(30, 25), (31, 26)]
    assert answer.headers["X-Image-Size"] == "30x25, 31x26"
    asked = await service.post("/decode", content=encoded.content, headers={"Accept": NPY})
    assert ZIP in refused(asked, 406, "not_acceptable")
    array = npy(safetensors(encoded.content))
    same = await service.post("/decode", content=array, params={"size": encoded.headers["X-Image-Size"], "fit": "pad"})
    assert same.content == answer.content
    whole = await service.post("/decode", content=encoded.content, params={"size": "32x32"}, headers={"Accept": NPY})
    assert array_of(whole).shape == (2, SIDE, SIDE, 3)


async def test_cropped_pictures_of_a_batch_say_where_each_belongs(service):
    files = [("image", ("a.png", picture(34, 33))), ("image", ("b.png", picture(38, 39)))]
    encoded = await service.post("/encode?fit=crop", files=files, headers={"Accept": SAFETENSORS})
    answer = await service.post("/decode", content=encoded.content, headers={"Accept": NPY})
    assert array_of(answer).shape == (2, SIDE, SIDE, 3)
    assert (answer.headers["X-Image-Size"], answer.headers["X-Image-Offset"]) == ("32x32", "1,0; 3,3")


async def test_quality_matters(service):
    bodies = [
        (await service.post(f"/decode?quality={quality}", content=npy(latent()), headers={"Accept": JPEG})).content
        for quality in (10, 95)
    ]
    assert len(bodies[0]) < len(bodies[1])


async def test_sixteen_bits(service):
    answer = await service.post("/decode?bits=16", content=npy(latent()))
    assert answer.content[24] == 16  # the depth in a PNG's header
    eight = picture_of(await service.post("/decode?bits=8", content=npy(latent())))
    assert eight.mode == "RGB"


async def test_raw_is_another_reading_of_the_same_numbers(service):
    array = latent(dtype=np.float32)
    scaled = await service.post("/decode", content=npy(array * np.float32(0.18215)), headers={"Accept": NPY})
    raw = await service.post("/decode?latents=raw", content=npy(array), headers={"Accept": NPY})
    assert raw.headers["X-Latents"] == "raw"
    assert abs(array_of(raw).astype(int) - array_of(scaled)).max() <= 1


async def test_a_file_that_says_what_it_is_need_not_be_asked(service):
    raw = (await service.post("/encode?latents=raw", content=picture(), headers={"Accept": SAFETENSORS})).content
    answer = await service.post("/decode", content=raw)
    assert answer.headers["X-Latents"] == "raw"
    refused(await service.post("/decode?latents=scaled", content=raw), 422, "invalid_parameter")


async def test_a_latent_of_another_family_is_a_conflict_that_names_both(service):
    tiny = await service.post("/encode?model=tiny", content=picture(), headers={"Accept": SAFETENSORS})
    detail = refused(await service.post("/decode?model=kl", content=tiny.content), 409, "family_mismatch")
    assert "taesd" in detail
    assert "sd1" in detail
    picture_of(await service.post("/decode?model=tiny", content=tiny.content))


@pytest.mark.parametrize(
    ("query", "plan"), [("precision=bf16", "bf16/whole"), ("tiling=always", "fp32/strips"), ("deterministic=1", None)]
)
async def test_plans_that_are_asked_for(service, query, plan):
    answer = await service.post(f"/decode?{query}", content=npy(latent()))
    picture_of(answer)
    assert answer.headers["X-Plan"] == (plan or "fp32/whole")
    assert answer.headers.get("X-Plan-Reason") == ("requested" if plan else None)


@pytest.mark.parametrize(
    ("query", "accept"),
    [
        ("size=32", PNG),
        ("size=0x32", PNG),
        ("size=-1x32", PNG),
        ("size=33x32", PNG),  # larger than the picture
        ("size=32x1e1", PNG),
        ("size=٣x٣", PNG),
        ("size=9999999999x1", PNG),
        ("quality=0", JPEG),
        ("quality=101", JPEG),
        ("quality=90", PNG),
        ("bits=12", PNG),
        ("bits=16", JPEG),
        ("bits=16", NPY),
        ("posterior=sample", PNG),  # parameters of /encode
        ("seed=1", PNG),
        ("fit=error", PNG),  # a value of /encode
        ("fit=resize", PNG),  # to which size?
        ("offset=1,1", PNG),  # of what?
        ("offset=1&fit=crop", PNG),
        ("size=32x32,32x32", PNG),  # there is one picture
        ("size=20x32&fit=resize", PNG),  # is made 24x32
        ("size=40x32&fit=crop", PNG),  # has nothing to crop
        ("size=8x8&size=16x16", PNG),
    ],
)
async def test_parameters_out_of_range_or_unknown_are_refused_by_name(service, query, accept):
    answer = await service.post(f"/decode?{query}", content=npy(latent()), headers={"Accept": accept})
    assert query.partition("=")[0] in refused(answer, 422, "invalid_parameter")


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def with_nan() -> np.ndarray:
    array = latent()
    array[0, 1, 2, 3] = np.nan
    return array


@pytest.mark.parametrize(
    ("body", "status", "code", "names"),
    [
        (objects(), 422, "invalid_latent", "objects"),
        (npy(latent(1, 3, 4, 4)), 422, "invalid_latent", "4 channels"),
        (npy(latent(0, 4, 4, 4)), 422, "invalid_latent", "(0, 4, 4, 4)"),
        (npy(latent(1, 4, 0, 4)), 422, "invalid_latent", "(1, 4, 0, 4)"),
        (npy(latent(4, 4)), 422, "invalid_latent", "(4, 4)"),
        (npy(latent().astype(np.float64)), 422, "invalid_latent", "float64"),
        (npy(latent().astype(np.uint8)), 422, "invalid_latent", "uint8"),
        (npy(with_nan()), 422, "invalid_latent", "(0, 1, 2, 3)"),
        (npy(latent())[:-1], 400, "malformed_body", "bytes"),
        (npy(latent())[:40], 400, "malformed_body", "truncated"),
        (picture(), 415, "unsupported_media", "PNG"),
        (b"", 415, "unsupported_media", "empty"),
    ],
)
async def test_what_is_no_latent_is_refused_with_its_reason_and_the_service_goes_on(service, body, status, code, names):
    assert names in refused(await service.post("/decode", content=body), status, code)
    picture_of(await service.post("/decode", content=npy(latent())))


@pytest.mark.parametrize(("media", "side"), [(JPEG, 65504), (WEBP, 16384)])
async def test_a_side_over_the_formats_limit_is_refused_before_there_is_room_for_it(service, monkeypatch, media, side):
    def admit(*_):
        raise AssertionError("admitted")

    monkeypatch.setattr(service.engine, "admit", admit)
    body = npy(latent(4, 1, side // 8))
    answer = await service.post("/decode", content=body, headers={"Accept": media})
    assert f"{side}x8" in refused(answer, 406, "not_acceptable")


async def test_what_size_crops_away_does_not_count_against_the_formats_limit(service):
    answer = await service.post("/decode?size=16383x8", content=npy(latent(4, 1, 2048)), headers={"Accept": WEBP})
    assert picture_of(answer).size == (16383, 8)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("float16", 4e-3)])
async def test_floats_are_the_networks_own_output(service, dtype, rounding):
    given = latent(2, 4, 4, 4)
    module = load_autoencoder(await service.engine.resolve("kl"), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        expected = module.decode(Whole(), torch.tensor(given).float()).permute(0, 2, 3, 1).numpy()
    for headers in ({}, {"Accept": NPY}, {"Accept": "*/*"}):
        answer = await service.post(f"/decode?latents=raw&dtype={dtype}", content=npy(given), headers=headers)
        assert answer.headers["content-type"] == NPY
        found = array_of(answer)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding)


async def test_bytes_are_the_floats_rounded(service):
    headers = {"Accept": NPY}
    given = npy(latent())
    eight = array_of(await service.post("/decode?dtype=uint8", content=given, headers=headers))
    wide = array_of(await service.post("/decode?dtype=float32", content=given, headers=headers))
    np.testing.assert_array_equal(((wide + 1) * 127.5).clip(0, 255).round(), eight)


async def test_floats_come_back_to_a_size_of_their_own(service):
    wide = array_of(await service.post("/decode?dtype=float32&size=30x25", content=npy(latent())))
    assert wide.shape == (1, 25, 30, 3)
    query = "/decode?dtype=float32&size=30x29&fit=resize"
    assert array_of(await service.post(query, content=npy(latent()))).shape == (1, 29, 30, 3)


async def test_floats_are_npy_or_refused(service):
    for accept in (PNG, ZIP, JPEG):
        answer = await service.post("/decode?dtype=float16", content=npy(latent()), headers={"Accept": accept})
        assert NPY in refused(answer, 406, "not_acceptable")
    answer = await service.post("/decode?dtype=float16&size=30x25,31x26", content=npy(latent(2, 4, 4, 4)))
    assert "one size" in refused(answer, 422, "invalid_parameter")
    answer = await service.post("/decode?dtype=float16&bits=16", content=npy(latent()))
    assert "bits=16" in refused(answer, 422, "invalid_parameter")


@pytest.mark.parametrize("claimed", [300, 2_000_000, 400_000_000])
async def test_a_batch_that_is_only_claimed_is_refused_as_a_number(service, claimed):
    """As a list of so many shapes the largest took 15 s and 3.3 GB."""
    array = io.BytesIO()
    header = {"descr": "<f2", "fortran_order": False, "shape": (claimed, 1, 1, 1)}
    np.lib.format.write_array_header_1_0(array, header)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", array.getvalue())
    body = bytearray(file.getvalue())
    size = len(array.getvalue()) + 2 * claimed
    for at in (22, body.index(b"PK\x01\x02") + 24):
        struct.pack_into("<I", body, at, size)
    tracemalloc.start()
    try:
        answer = await service.post("/decode", content=bytes(body))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert f"{claimed} pictures" in refused(answer, 413, "too_large")


# --------------------------------------------------------------------------------------------------------------- alpha


@pytest.fixture(scope="module")
async def layered(rgba):
    async with serving(rgba) as service:
        yield service


Z = latent(1, 16, 4, 5)


async def test_pictures_come_with_the_alpha_of_the_network(layered):
    post = partial(layered.post, "/decode", content=npy(Z))
    expected = array_of(await post(headers={"Accept": NPY}))
    assert (expected.shape, expected.dtype.name) == ((1, 32, 40, 4), "uint8")
    for bits in ("8", "16"):
        image: Any = cv2.imdecode(
            np.frombuffer((await post(params={"bits": bits})).content, np.uint8), cv2.IMREAD_UNCHANGED
        )
        scale = 1 if bits == "8" else 257
        assert np.abs(image[..., [2, 1, 0, 3]] / scale - expected[0]).max() <= 0.51
    floats = array_of(await post(params={"dtype": "float32"}, headers={"Accept": NPY}))
    np.testing.assert_array_equal(((floats + 1) * 127.5).round(), expected)
    webp = picture_of(await post(headers={"Accept": "image/webp"}))
    assert (webp.mode, webp.size) == ("RGBA", (40, 32))
    cut = picture_of(await post(params={"size": "37x30"}))
    np.testing.assert_array_equal(np.asarray(cut), expected[0, :30, :37])
    several = await layered.post("/decode", content=npy(np.concatenate([Z, Z])))
    with zipfile.ZipFile(io.BytesIO(several.content)) as archive:
        for name in archive.namelist():
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(archive.read(name)))), expected[0])


async def test_a_jpeg_is_laid_over_white_and_says_so(layered):
    answer = await layered.post("/decode", content=npy(Z), headers={"Accept": "image/jpeg"})
    assert picture_of(answer).mode == "RGB"
    assert "image/jpeg has no alpha" in answer.headers["x-warning"]
    assert "x-warning" not in (await layered.post("/decode", content=npy(Z))).headers


async def test_strips_have_alpha_too(layered):
    whole, strips = [
        array_of(await layered.post(f"/decode?tiling={tiling}", content=npy(Z), headers={"Accept": NPY}))
        for tiling in ("never", "always")
    ]
    assert np.abs(whole.astype(int) - strips).max() <= 1


async def test_the_row_of_a_model_says_that_it_has_alpha(layered, service):
    assert (await layered.get("/models/layered")).json()["pixel_channels"] == 4
    assert (await service.get("/models/kl")).json()["pixel_channels"] == 3
