import numpy as np
import pytest

from app.engine.linear import apply, decibel, fit
from app.errors import InvalidLatent


def exact(patch, channels, count=3, seed=0):
    """Latents, and pictures (8 pixels for each position of their grid) that are a linear map of them."""
    draw = np.random.default_rng(seed)
    weights = draw.uniform(-0.2, 0.2, (channels, 3 * patch * patch))
    latents = [draw.uniform(-0.5, 0.5, (channels, 6, 4)).astype(np.float32) for _ in range(count)]
    pictures = []
    for latent in latents:
        colours = 0.5 + np.einsum("chw,ck->hwk", latent, weights)
        blocks = colours.reshape(6, 4, patch, patch, 3).transpose(0, 2, 1, 3, 4).reshape(6 * patch, 4 * patch, 3)
        pictures.append((blocks.clip(0, 1) * 255 + 0.5).astype(np.uint8).repeat(8, 0).repeat(8, 1))
    return latents, pictures


@pytest.mark.parametrize(("patch", "channels"), [(1, 4), (2, 8)])
def test_what_is_linear_is_found(patch, channels):
    latents, pictures = exact(patch, channels)
    linear = fit(latents, pictures, patch)
    assert linear.psnr_db > 35  # pictures are rounded to 255 levels, and the ridge pulls a little
    for latent, picture in zip(latents, pictures, strict=True):
        shown = apply(linear, latent.astype(np.float16))
        assert shown.shape == (6 * patch, 4 * patch, 3)
        assert np.abs(shown.astype(int) - picture[::8, ::8]).max() <= 6


def test_the_error_is_that_of_pictures_left_out():
    latents, pictures = exact(1, 4, count=2)
    strange = [
        np.random.default_rng(9).permutation(picture.reshape(-1, 3)).reshape(picture.shape) for picture in pictures
    ]
    assert fit(latents, strange, 1).psnr_db < fit(latents, pictures, 1).psnr_db - 10


def test_another_number_of_channels_is_refused():
    latents, pictures = exact(1, 4)
    with pytest.raises(InvalidLatent, match="takes 4 channels, the latent has 5"):
        apply(fit(latents, pictures, 1), np.zeros((5, 2, 2), np.float16))


def test_decibel():
    assert decibel(0.01) == pytest.approx(20.0)
    assert decibel(0.0) == 99.0
