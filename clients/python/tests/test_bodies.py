"""What is sent for a picture and for latents, what an answer is as an array, and files."""

import io

import numpy as np
import pytest
from PIL import Image

from latentd_client import UnexpectedAnswer
from latentd_client.bodies import (
    AVIF,
    LATENTS,
    NPY,
    PICTURES,
    PNG,
    ZIP,
    array_of,
    latents_body,
    media_of,
    npy,
    picture_body,
    picture_file,
    write_file,
)
from tests.service import picture, pixels


def sent(body: bytes) -> np.ndarray:
    return np.load(io.BytesIO(body))


@pytest.mark.parametrize("form", [str, lambda path: path])
def test_a_file_is_sent_as_it_is(tmp_path, form):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture(kind="JPEG"))
    assert picture_body(form(path)) == latents_body(form(path)) == path.read_bytes()
    assert picture_body(b"bytes") == latents_body(b"bytes") == b"bytes"


def test_arrays_are_sent_as_batches():
    eight, floats = pixels(), np.zeros((3, 8, 8), np.float32)
    np.testing.assert_array_equal(sent(picture_body(eight)), eight[None])
    np.testing.assert_array_equal(sent(picture_body(eight[None])), eight[None])
    assert sent(picture_body(floats)).shape == (1, 3, 8, 8)
    assert sent(picture_body(floats[None].astype(np.float16))).dtype == np.float16
    turned = eight[:, ::-1]
    np.testing.assert_array_equal(sent(picture_body(turned)), turned[None])


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8, 5), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8))],
)
def test_other_arrays_are_refused_here(array):
    with pytest.raises(ValueError, match="pictures are uint8"):
        picture_body(array)


def test_alpha_goes_and_comes():
    four = np.dstack([pixels(), pixels()[..., :1]])
    np.testing.assert_array_equal(sent(picture_body(four)), four[None])
    assert sent(picture_body(np.zeros((4, 8, 8), np.float16))).shape == (1, 4, 8, 8)
    file = io.BytesIO()
    Image.fromarray(four).save(file, "PNG")
    np.testing.assert_array_equal(array_of(file.getvalue(), PNG), four[None])


def test_pil_pictures_are_sent_without_loss():
    rgb = Image.fromarray(pixels())
    np.testing.assert_array_equal(sent(picture_body(rgb))[0], pixels())
    clear = rgb.copy()
    clear.putalpha(100)
    again = Image.open(io.BytesIO(picture_body(clear)))
    assert (again.format, again.mode) == ("PNG", "RGBA")
    assert again.tobytes() == clear.tobytes()


def test_a_picture_as_a_file_needs_no_pillow():
    array = pixels(21, 13)
    for form in (array, Image.fromarray(array)):
        read = Image.open(io.BytesIO(picture_file(form)))
        assert (read.format, read.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(read), array)
    assert picture_file(b"bytes") == b"bytes"
    with pytest.raises(ValueError, match="here a picture is uint8"):
        picture_file(array[None])


def test_anything_else_is_a_type_error():
    with pytest.raises(TypeError, match="a picture is"):
        picture_body(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="latents are"):
        latents_body([1, 2])  # type: ignore[arg-type]


def test_what_came_as_an_array():
    np.testing.assert_array_equal(array_of(npy(pixels()), NPY), pixels())
    np.testing.assert_array_equal(array_of(picture(), PNG), pixels()[None])
    avif = io.BytesIO()
    Image.fromarray(pixels()).save(avif, "AVIF", quality=100, subsampling="4:4:4")
    np.testing.assert_allclose(array_of(avif.getvalue(), AVIF), pixels()[None], atol=8)
    with pytest.raises(ValueError, match="no single array"):
        array_of(b"", ZIP)
    hostile = io.BytesIO()
    np.save(hostile, np.array([object()]), allow_pickle=True)
    with pytest.raises(UnexpectedAnswer, match=r"not the \.npy"):
        array_of(hostile.getvalue(), NPY)


@pytest.mark.parametrize("shape", ["(1, 2)", "(1, 4)", "(99999999999, 9999999999)", "(9, 2)", f"({'9' * 70}, 1)", "()"])
def test_a_shape_that_lies_is_not_believed(shape):
    content = npy(np.zeros((1, 3), np.float16))
    with pytest.raises(UnexpectedAnswer):
        array_of(content.replace(b"(1, 3)", shape.encode()), NPY)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff" + b"-" * 70_000, b"<html>"])
@pytest.mark.parametrize("media", [NPY, PNG, AVIF])
def test_what_is_not_of_its_type_is_told(content, media):
    with pytest.raises(UnexpectedAnswer):
        array_of(content, media)


def test_the_type_is_that_of_the_name(tmp_path):
    assert (media_of("A.PNG", PICTURES), media_of(tmp_path / "a.npy", LATENTS)) == (PNG, NPY)
    with pytest.raises(ValueError, match=r"\.npy, \.npz, \.safetensors"):
        media_of("a.png", LATENTS)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_file(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]
