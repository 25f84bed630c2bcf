import io
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from app.wire.headers import read_header
from app.wire.images import read_image
from app.wire.png import write_png

SIZES = [(1, 1), (1, 7), (7, 1), (1, 1000), (1000, 1), (17, 31), (64, 64)]


def noise(size, dtype=np.uint8, channels=3):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (*size, channels), dtype)


def photographs():
    return {"astronaut": skimage.data.astronaut(), "coffee": skimage.data.coffee(), "chelsea": skimage.data.chelsea()}


def opencv(body):
    image = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image[..., ::-1]  # BGR


@pytest.mark.parametrize("size", SIZES)
def test_8_bits(size):
    pixels = noise(size)
    body = write_png(pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), pixels)
    np.testing.assert_array_equal(opencv(body), pixels)


@pytest.mark.parametrize("size", SIZES)
def test_16_bits(size):
    pixels = noise(size, np.uint16)
    body = write_png(pixels)
    np.testing.assert_array_equal(opencv(body), pixels)
    assert Image.open(io.BytesIO(body)).size == size[::-1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", SIZES)
def test_alpha(size, dtype):
    pixels = noise(size, dtype, channels=4)
    body = write_png(pixels)
    image = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    np.testing.assert_array_equal(image[..., [2, 1, 0, 3]], pixels)  # BGRA
    assert Image.open(io.BytesIO(body)).mode == "RGBA"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "view",
    [
        lambda pixels: pixels[::2, 1::3],
        lambda pixels: pixels[::-1, ::-1],
        lambda pixels: pixels.transpose(1, 0, 2),
        np.asfortranarray,
        lambda pixels: pixels.astype(pixels.dtype.newbyteorder(">")),
        lambda pixels: np.broadcast_to(pixels[:1, :1], (5, 6, 3)),
    ],
)
def test_any_layout_in_memory(view, dtype):
    pixels = view(noise((20, 30), dtype))
    np.testing.assert_array_equal(opencv(write_png(pixels)), pixels)


@pytest.mark.parametrize("name", photographs())
def test_photographs(name):
    pixels = photographs()[name]
    body = write_png(pixels)
    np.testing.assert_array_equal(
        read_image(body, read_header(body), background=(0, 0, 0), max_pixels=pixels.size), pixels
    )
    reference = io.BytesIO()
    Image.fromarray(pixels).save(reference, "PNG", compress_level=1)
    assert len(body) < 1.1 * len(reference.getvalue())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_are_left_alone(dtype):
    pixels = noise((5, 6), dtype)
    before = pixels.copy()
    write_png(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_large_data_is_cut_into_chunks(monkeypatch):
    monkeypatch.setattr("app.wire.png._MAX_CHUNK", 1000)
    body = write_png(noise((40, 40)))
    assert body.count(b"IDAT") == 5
    np.testing.assert_array_equal(opencv(body), noise((40, 40)))


@pytest.mark.skipif(shutil.which("pngcheck") is None, reason="pngcheck is not installed")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pngcheck(dtype, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(write_png(noise((33, 65), dtype)))
    subprocess.run(["pngcheck", "-q", path], check=True)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
)
def test_other_arrays_are_a_bug(pixels):
    with pytest.raises(ValueError, match="expected uint8 or uint16"):
        write_png(pixels)
