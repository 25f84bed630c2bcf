import numpy as np
import pytest

from app.errors import InvalidImage, InvalidLatent, MalformedBody
from app.wire.arrays.latents import LatentShape
from app.wire.arrays.spec import PIXELS
from app.wire.arrays.tensor_bytes import CODES, Layout, bytes_spec, latent_layout, read_layout


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def layout(
    array: np.ndarray, size: tuple[int, int] | None = None, *, patched: bool = False, channels: int = 4
) -> Layout:
    return latent_layout(array.shape, "float32", array.nbytes, size=size, channels=channels, factor=8, patched=patched)


def read(array: np.ndarray, size: tuple[int, int] | None = None, *, patched: bool = False) -> np.ndarray:
    found = layout(array, size, patched=patched)
    items = read_layout(found, memoryview(array.tobytes()))
    assert found.shape == LatentShape(((len(items), *items[0].shape),), "float32")
    return np.stack(items)


def packed(latents: np.ndarray) -> np.ndarray:
    """By hand: row by row, the 2x2 positions of each channel one after the other."""
    _, _, height, width = latents.shape
    corners = [(y, x) for y in range(0, height, 2) for x in range(0, width, 2)]
    return np.array([[one[:, y : y + 2, x : x + 2].reshape(-1) for y, x in corners] for one in latents])


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_bytes_of_every_float(dtype):
    array = np.array([0.5, -2, 3, 1.25], np.float32).reshape(1, 1, 2, 2)
    data = array.astype("<f2").tobytes() if dtype == "float16" else array.tobytes()
    if dtype == "bfloat16":
        data = (array.view("<u4") >> 16).astype("<u2").tobytes()
    found = latent_layout((1, 1, 2, 2), dtype, len(data), size=None, channels=1, factor=8)
    assert found.shape.dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(np.stack(read_layout(found, data)), array)


def test_latents_with_and_without_their_batch():
    z = noise(2, 4, 6, 10)
    np.testing.assert_array_equal(read(z), z)
    np.testing.assert_array_equal(read(z[0]), z[:1])
    for size in ((48, 80), (7, 7)):  # said beside latents that are not packed
        np.testing.assert_array_equal(read(z, size), z)
        np.testing.assert_array_equal(read(z[0], size), z[:1])


@pytest.mark.parametrize("size", [(48, 80), (63, 95)])
def test_packed_latents_are_told_by_the_pictures_size(size):
    z = noise(2, 4, 6, 10)
    np.testing.assert_array_equal(read(packed(z), size), z)
    np.testing.assert_array_equal(read(packed(z)[0], size), z[:1])


def test_patches_may_stay_channels():
    z = noise(2, 4, 6, 10)
    expected = z.reshape(2, 4, 3, 2, 5, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 16, 3, 5)
    np.testing.assert_array_equal(read(packed(z), (48, 80), patched=True), expected)
    np.testing.assert_array_equal(read(z, (48, 80), patched=True), z)


def test_a_latent_that_is_as_wide_as_a_patch_is_no_packed_one():
    z = noise(4, 32, 16)  # (C, h, w) of 256x128 pixels, whose patches would be 128
    np.testing.assert_array_equal(read(z, (256, 128)), z[None])


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        ((1, 15, 16), None, "height and width"),
        ((1, 15, 16), (48, 96), "96x48"),
        ((15, 16), None, "height and width"),
        ((15, 15), (48, 80), "expected a shape"),
        ((240,), (48, 80), "expected a shape"),
        ((2, 4, 2, 6, 10), None, "expected one clip"),
        ((1, 1, 4, 1, 6, 10), None, "expected a shape"),
    ],
)
def test_other_shapes_are_refused(shape, size, words):
    with pytest.raises(InvalidLatent, match=words):
        layout(noise(*shape), size)


def test_a_clip_of_one_frame_is_a_picture():
    z = noise(2, 4, 1, 6, 10)
    np.testing.assert_array_equal(read(z), z[:, :, 0])


def test_a_shape_that_its_bytes_are_not():
    for purpose_of, shape in ((latent_layout, (1, 4, 2, 2)), (latent_layout, (1 << 30, 4, 1 << 30, 1 << 30))):
        with pytest.raises(MalformedBody, match="64 are there" if shape[0] == 1 else "bytes of data"):
            purpose_of(shape, "float16", 64, size=None, channels=4, factor=8)


def test_values_that_are_not_finite_are_refused():
    z = noise(1, 4, 2, 2)
    z[0, 1, 1, 1] = np.nan
    for array, size in ((z, None), (packed(z), (16, 16))):
        with pytest.raises(InvalidLatent, match="1 of 16 values"):
            read_layout(layout(array, size), array.tobytes())


def test_only_pixels_may_be_bytes():
    assert bytes_spec((4, 5, 3), "uint8", 60, PIXELS).dtype == "uint8"
    with pytest.raises(InvalidLatent, match="got uint8"):
        latent_layout((4, 5, 3), "uint8", 60, size=None, channels=4, factor=8)
    with pytest.raises(InvalidImage, match="expected a shape"):
        bytes_spec((60,), "uint8", 60, PIXELS)
    assert set(CODES) == {"float16", "float32", "bfloat16", "uint8"}
