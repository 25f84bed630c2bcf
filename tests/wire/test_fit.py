import numpy as np
import pytest

from app.errors import InvalidImage
from app.wire.fit import fit, fitted_size, resized
from tests.service import pixels


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("mode", ["pad", "crop", "resize", "error"])
def test_multiples_stay_as_they_are(mode):
    image = noise(16, 24)
    assert fit(image, 8, mode) is image


@pytest.mark.parametrize(("size", "padded"), [((1, 1), (8, 8)), ((9, 16), (16, 16)), ((16, 23), (16, 24))])
def test_pad_repeats_the_edge(size, padded):
    image = noise(*size)
    fitted = fit(image, 8, "pad")
    assert fitted.shape == (*padded, 3)
    np.testing.assert_array_equal(fitted[: size[0], : size[1]], image)
    assert (fitted[size[0] :] == fitted[size[0] - 1]).all()
    assert (fitted[:, size[1] :] == fitted[:, size[1] - 1 : size[1]]).all()


def test_crop_keeps_the_centre():
    image = noise(21, 31)
    np.testing.assert_array_equal(fit(image, 8, "crop"), image[2:18, 3:27])


def test_nothing_to_crop():
    with pytest.raises(InvalidImage, match="100x7 has no 8x8"):
        fit(noise(7, 100), 8, "crop")


@pytest.mark.parametrize(("size", "nearest"), [((11, 12), (8, 16)), ((1, 3), (8, 8)), ((19, 20), (16, 24))])
def test_resize_goes_to_the_nearest(size, nearest):
    assert fit(noise(*size), 8, "resize").shape == (*nearest, 3)


def test_resize_keeps_flat_colour():
    assert (fit(np.full((13, 13, 3), 77, np.uint8), 8, "resize") == 77).all()


def test_error_names_size_and_multiple():
    with pytest.raises(InvalidImage, match="multiples of 16, got 20x16"):
        fit(noise(16, 20), 16, "error")


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
@pytest.mark.parametrize("size", [(8, 8), (9, 16), (23, 12), (100, 15)])
def test_fitted_size_foretells_fit(mode, size):
    height, width, _ = fit(noise(*size), 8, mode).shape
    assert fitted_size(size[1], size[0], 8, mode) == (width, height)


@pytest.mark.parametrize(("mode", "width", "height"), [("crop", 100, 7), ("error", 16, 20)])
def test_fitted_size_refuses_what_fit_refuses(mode, width, height):
    with pytest.raises(InvalidImage) as foretold:
        fitted_size(width, height, 16, mode)
    with pytest.raises(InvalidImage) as fitted:
        fit(noise(height, width), 16, mode)
    assert str(foretold.value) == str(fitted.value)


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_floats_are_fitted_as_bytes_are(mode, dtype):
    image = pixels(30, 21)
    fitted = fit((image / 127.5 - 1).astype(dtype), 8, mode)
    expected = fit(image, 8, mode)
    assert (fitted.shape, fitted.dtype) == (expected.shape, np.dtype(dtype))
    back = ((fitted.astype(float) + 1) * 127.5).clip(0, 255)
    assert np.abs(back - expected).max() <= 1.2


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
def test_a_resize_keeps_the_dtype_and_flat_colour(dtype):
    flat = np.full((13, 11, 3), 77, dtype)
    assert resized(flat, (5, 6)).shape == (6, 5, 3)
    assert resized(flat, (5, 6)).dtype == np.dtype(dtype)
    np.testing.assert_allclose(resized(flat, (5, 6)), 77, rtol=1e-6)


def test_floats_go_beyond_their_range_and_bytes_do_not():
    edge = np.zeros((16, 16, 3))
    edge[:, 8:] = 1
    assert resized(edge.astype(np.float32), (23, 23)).max() > 1
    assert resized((edge * 65535).astype(np.uint16), (23, 23)).max() == 65535
