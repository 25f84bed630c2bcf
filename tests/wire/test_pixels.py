import io
from typing import Any

import numpy as np
import pytest

from app.errors import InvalidImage, MalformedBody, UnsupportedMedia
from app.weights.header import Entry, Header, format_header
from app.wire.pixels import FURTHEST, check_channels, pixels_header, read_pixels
from tests.service import npy, picture, pixels


def read(body: bytes) -> list[np.ndarray]:
    return read_pixels(body, pixels_header(body), background=(255, 255, 255), max_pixels=1 << 20)


def sizes(body: bytes) -> list[tuple[int, int]]:
    header = pixels_header(memoryview(body))
    assert header.work >= sum(array.nbytes for array in read(body))
    return [header.size] * header.count


def tensors(array: np.ndarray, code: str, name: str = "anything") -> bytes:
    data = array.tobytes()
    return format_header(Header({name: Entry(code, array.shape, 0, len(data))})) + data


def noise(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)


def refuse(body: bytes, error: type[Exception], match: str) -> None:
    """By the header alone."""
    with pytest.raises(error, match=match):
        pixels_header(body)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "AVIF"])
def test_a_picture_file_is_one_picture(kind):
    body = picture(30, 20, kind=kind)
    assert sizes(body) == [(30, 20)]
    (array,) = read(body)
    assert (array.shape, array.dtype) == ((20, 30, 3), np.dtype(np.uint8))


def test_bytes_stay_bytes_with_their_channels_last():
    batch = np.stack([pixels(30, 20, seed=seed) for seed in range(2)])
    for body in (npy(batch), npy(np.asfortranarray(batch)), tensors(batch, "U8")):
        assert sizes(body) == [(30, 20)] * 2
        np.testing.assert_array_equal(read(body), batch)
    assert sizes(npy(batch[0])) == [(30, 20)]
    np.testing.assert_array_equal(read(npy(batch[0]))[0], batch[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", ">f2"])
def test_floats_have_their_channels_first_and_become_float32(dtype):
    batch = noise(2, 3, 20, 30, dtype=dtype)
    for body, expected in ((npy(batch), batch), (npy(batch[1]), batch[1:])):
        assert sizes(body) == [(30, 20)] * len(expected)
        found = read(body)
        assert {array.dtype for array in found} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(found, expected.transpose(0, 2, 3, 1))


def test_safetensors_hold_bfloat16_too():
    batch = (noise(1, 3, 4, 5).view(np.uint32) >> 16 << 16).view(np.float32)
    for body in (tensors(batch, "F32"), tensors((batch.view(np.uint32) >> 16).astype(np.uint16), "BF16")):
        np.testing.assert_array_equal(read(body), batch.transpose(0, 2, 3, 1))


def test_what_comes_is_writable_and_does_not_hold_the_body():
    for body in (npy(pixels()), npy(noise(3, 8, 8))):
        (array,) = read(body)
        array[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"\(H, W, 3\).* in uint8.*got \(1, 3, 8, 9\) in uint8"),
        (np.zeros((8, 9, 5), np.uint8), r"got \(1, 8, 9, 5\) in uint8"),
        (np.zeros((8, 9, 2), np.uint8), r"with alpha 4 for 3, got \(1, 8, 9, 2\) in uint8"),
        (np.zeros((8, 9, 3), np.float32), r"got \(1, 8, 9, 3\) in float32"),
        (np.zeros((1, 5, 8, 8), np.float16), r"got \(1, 5, 8, 8\) in float16"),
        (np.zeros((8, 9), np.uint8), r"got \(8, 9\)"),
        (np.zeros((1, 1, 8, 9, 3), np.uint8), r"got \(1, 1, 8, 9, 3\)"),
        (np.zeros((0, 8, 9, 3), np.uint8), "no dimension of 0"),
        (np.zeros((8, 9, 3), np.float64), "float16 or float32 or uint8, got float64"),
        (np.zeros((8, 9, 3), np.int8), "got int8"),
        (np.zeros((8, 9, 3), np.uint16), "got uint16"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(array, match):
    refuse(npy(array), InvalidImage, match)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 255.0, -FURTHEST * 1.01])
def test_pixels_far_out_of_range_are_refused(value):
    batch = noise(2, 3, 4, 4)
    batch[1, 2, 3, 3] = value
    assert pixels_header(npy(batch)).count == 2  # its values are not looked at
    with pytest.raises(InvalidImage, match=r"finite pixels in \[-1, 1\]"):
        read(npy(batch))
    batch[1, 2, 3, 3] = FURTHEST
    assert len(read(npy(batch))) == 2


def test_a_body_that_is_cut_off_or_something_else_is_refused():
    refuse(npy(pixels())[:-1], MalformedBody, "bytes of data")
    refuse(tensors(pixels(), "U8")[:-1], MalformedBody, "bytes of data")
    refuse(b"no picture", UnsupportedMedia, "PNG, JPEG, WebP, AVIF, npy or safetensors")
    file = io.BytesIO()
    np.savez(file, pixels())
    refuse(file.getvalue(), UnsupportedMedia, "got npz")


def test_of_several_tensors_none_is_meant():
    one, two = (Entry("U8", (1, 1, 3), at, at + 3) for at in (0, 3))
    refuse(format_header(Header({"latents": one, "other": two})) + bytes(6), InvalidImage, "expected one tensor, got")


def test_alpha_is_taken_where_a_model_has_it():
    four, floats = np.dstack([pixels(), pixels()[..., :1]]), noise(2, 4, 8, 9)
    for array, expected in ((four, four[None]), (floats, floats.transpose(0, 2, 3, 1))):
        header = pixels_header(npy(array))
        check_channels(header, 4)
        with pytest.raises(InvalidImage, match="expected 3 channels, got 4"):
            check_channels(header, 3)
        assert header.size == expected.shape[2:0:-1]
        found = read_pixels(npy(array), header, background=None, max_pixels=1 << 20)
        np.testing.assert_array_equal(found, expected)


def test_what_has_no_alpha_is_opaque():
    for array, expected in ((pixels(), 255), (noise(2, 3, 8, 9), 1), (noise(3, 8, 9, dtype=np.float16), 1)):
        body = npy(array)
        header = pixels_header(body)
        found = np.stack(read_pixels(body, header, background=None, max_pixels=1 << 20))
        np.testing.assert_array_equal(found[..., :3], read(body))
        assert (found[..., 3] == expected).all()
        assert header.work >= 2 * found.nbytes
