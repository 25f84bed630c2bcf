import numpy as np
import pytest
import torch

from app.vae.families import FAMILIES
from clients.comfyui.convention import (
    CONVENTIONS,
    RAW,
    Convention,
    cropped,
    from_service,
    picture_array,
    pictures_of,
    to_service,
)


def test_latents_of_a_full_vae_travel_as_the_network_has_them():
    latents = torch.randn(2, 4, 3, 5)
    assert (to_service(latents, RAW) == latents.numpy()).all()
    assert torch.equal(from_service(latents.numpy(), RAW), latents)


@pytest.mark.parametrize(
    ("tiny", "full"), [("taesd", "sd1"), ("taesdxl", "sdxl"), ("taesd3", "sd3"), ("taef1", "flux")]
)
def test_a_tiny_autoencoder_is_told_what_its_diffusion_model_sees(tiny, full):
    latents = torch.randn(1, 4, 3, 5)
    told = to_service(latents, CONVENTIONS[tiny])
    torch.testing.assert_close(torch.from_numpy(told), FAMILIES[full].latent_format.scale(latents))
    torch.testing.assert_close(from_service(told, CONVENTIONS[tiny]), latents)


def test_the_patch_of_a_convention_is_that_of_the_service():
    assert {name: FAMILIES[name].latent_format.patch for name in CONVENTIONS} == {
        name: convention.patch for name, convention in CONVENTIONS.items()
    }
    assert not any(row.latent_format.patch > 1 for name, row in FAMILIES.items() if name not in CONVENTIONS)


def test_latents_of_half_precision_on_any_device_travel_as_float32():
    told = to_service(torch.ones(1, 4, 2, 2, dtype=torch.bfloat16).requires_grad_(), Convention("scaled", scale=0.5))
    assert told.dtype == np.float32
    assert (told == 0.5).all()


def test_the_middle_of_a_picture_is_kept():
    pixels = torch.arange(2 * 21 * 19 * 4, dtype=torch.float32).reshape(2, 21, 19, 4)
    assert torch.equal(cropped(pixels, 8), pixels[:, 2:18, 1:17, :3])


def test_a_picture_that_fits_is_whole():
    pixels = torch.rand(1, 16, 24, 3)
    assert torch.equal(cropped(pixels, 8), pixels)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 7, 64, 3), "64x7 is smaller than 8"), ((1, 8, 8, 1), r"\(1, 8, 8, 1\)"), ((8, 8, 3), r"\(8, 8, 3\)")],
)
def test_what_is_no_picture_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        cropped(torch.zeros(shape), 8)


def test_every_level_of_a_loaded_picture_travels_exactly():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, axis=3)
    array = picture_array(torch.from_numpy(levels).float() / 255.0)
    assert array.dtype == np.uint8
    assert (array == levels).all()


def test_values_between_the_levels_travel_as_float16():
    pixels = torch.tensor([[[[0.0, 0.5, 1.0]]]])
    array = picture_array(pixels)
    assert (str(array.dtype), array.shape) == ("float16", (1, 3, 1, 1))
    assert array.ravel().tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("value", [-1 / 255, 256 / 255, float("nan")])
def test_levels_that_a_byte_does_not_have_do_not_wrap_around(value):
    assert picture_array(torch.full((1, 1, 1, 3), value)).dtype == np.float16


def test_what_lies_beyond_black_and_white_is_cut_off():
    sent = np.array([-3.0, -1.0, 0.0, 1.0, 3.0], np.float16)
    assert pictures_of(sent).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
