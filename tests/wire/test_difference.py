import math

import numpy as np
import pytest
from skimage.color import lab2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from app.wire import difference as module
from app.wire.difference import cielab, difference


def lab_picture(lightness: float = 60.0, chroma: float = 30.0, turn: float = 0.0, side: int = 48) -> np.ndarray:
    """All hues, all within sRGB; `turn` in degrees."""
    y, x = np.mgrid[:side, :side]
    angle = 2 * np.pi * x / side + np.radians(turn)
    wave = lightness + 5 * np.sin(y)
    lab = np.stack([wave, chroma * np.cos(angle), chroma * np.sin(angle)], -1)
    return np.round(lab2rgb(lab) * 255).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_the_pictures_of_these_tests_are_within_srgb():
    lab = rgb2lab(lab_picture())
    assert np.hypot(lab[..., 1], lab[..., 2]).min() > 28


@pytest.mark.parametrize("picture", [lab_picture(), noise(40, 30), np.full((9, 9, 3), 128, np.uint8)])
def test_the_same_picture_does_not_differ(picture):
    found = difference(picture, picture.copy())
    assert found.psnr == math.inf
    assert found.ssim == pytest.approx(1)
    assert (found.luminance, found.saturation) == (0, 0)
    assert found.hue == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("chroma", [5.0, 12.0, 30.0])
def test_saturation_is_the_chroma_that_was_added_or_taken(chroma):
    found = difference(lab_picture(chroma=20), lab_picture(chroma=chroma))
    assert found.saturation == pytest.approx(chroma - 20, abs=0.1)
    assert found.luminance == pytest.approx(0, abs=0.1)
    assert found.hue == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("turn", [25.0, -25.0, 90.0, 175.0, -175.0])
def test_hue_is_the_angle_that_it_was_turned_by(turn):
    found = difference(lab_picture(), lab_picture(turn=turn))
    assert found.hue == pytest.approx(turn, abs=0.5)
    assert found.saturation == pytest.approx(0, abs=0.1)


def test_half_a_turn_is_plus_180():
    red, cyan = np.array([[[70.0, 40, 0]]]), np.array([[[70.0, -40, 0]]])
    first, second = (np.full((8, 8, 3), np.round(lab2rgb(c) * 255), np.uint8) for c in (red, cyan))
    assert abs(difference(first, second).hue) == pytest.approx(180, abs=1)
    assert module._degrees(complex(-1, -0.0)) == 180
    assert module._degrees(complex(-1, 0.0)) == 180


def test_hue_is_weighted_by_chroma():
    """Nearly grey pixels that turn by half a circle do not outweigh vivid ones that stay."""
    vivid, pale, turned = lab_picture(chroma=28), lab_picture(chroma=3), lab_picture(chroma=3, turn=180)
    found = difference(np.vstack([vivid, pale, pale]), np.vstack([vivid, turned, turned]))
    assert found.hue == pytest.approx(0, abs=0.5)


def test_grey_has_no_hue():
    grey = np.full((16, 16, 3), 100, np.uint8)
    tinted = grey + np.array([1, 0, 0], np.uint8)
    assert difference(grey, grey + np.uint8(40)).hue == 0
    assert difference(grey, tinted).hue == 0


@pytest.mark.parametrize("lightness", [45.0, 70.0])
def test_luminance_is_the_lightness_that_was_added_or_taken(lightness):
    found = difference(lab_picture(lightness=60, chroma=20), lab_picture(lightness=lightness, chroma=20))
    assert found.luminance == pytest.approx(lightness - 60, abs=0.1)
    assert found.saturation == pytest.approx(0, abs=0.1)


def test_black_to_white_is_a_hundred():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert difference(black, white).luminance == pytest.approx(100, abs=1e-3)
    assert difference(white, black).luminance == pytest.approx(-100, abs=1e-3)
    assert difference(black, white).psnr == pytest.approx(0)


def test_psnr_by_hand():
    grey = np.full((10, 10, 3), 100, np.uint8)
    assert difference(grey, grey + np.uint8(1)).psnr == pytest.approx(20 * math.log10(255))
    off = grey.copy()
    off[0, 0, 0] = 90  # bytes must not wrap around
    assert difference(grey, off).psnr == pytest.approx(10 * math.log10(255**2 * 300 / 100))
    assert difference(off, grey).psnr == difference(grey, off).psnr


@pytest.mark.parametrize("shape", [(7, 7), (8, 64), (65, 33)])
def test_it_is_what_scikit_image_says(shape):
    height, width = shape
    first = noise(height, width)
    second = noise(height, width, seed=1) // 2 + first // 2
    found = difference(first, second)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(first, second))
    assert found.ssim == pytest.approx(structural_similarity(first, second, channel_axis=-1, data_range=255))


def test_cielab_is_what_scikit_image_says():
    levels = np.array([0, 1, 2, 10, 11, 60, 128, 254, 255], np.uint8)
    picture = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 9, 3)
    assert np.abs(cielab(picture) - rgb2lab(picture)).max() < 1e-3  # whose constants are rounded


def test_bands_do_not_show(monkeypatch):
    first, second = noise(50, 20), noise(50, 20) // 2 + lab_picture(side=50)[:, :20] // 2
    whole = difference(first, second)
    for pixels in (1, 20 * 7, 20 * 13, 20 * 49):
        monkeypatch.setattr(module, "BAND_PIXELS", pixels)
        banded = difference(first, second)
        for name in ("psnr", "ssim", "luminance", "saturation", "hue"):
            assert getattr(banded, name) == pytest.approx(getattr(whole, name)), (name, pixels)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (6, 6), (1, 40), (40, 6)])
def test_pictures_smaller_than_a_window(shape):
    height, width = shape
    found = difference(noise(height, width), noise(height, width))
    assert found.psnr == math.inf
    assert found.ssim == pytest.approx(1)
    worse = difference(noise(height, width), noise(height, width, seed=1))
    assert -1 <= worse.ssim < 1
    assert math.isfinite(worse.psnr)


def test_sizes_that_differ_are_the_callers_fault():
    with pytest.raises(ValueError, match=r"\(8, 8, 3\) and \(8, 16, 3\)"):
        difference(noise(8, 8), noise(8, 16))
