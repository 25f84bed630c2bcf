"""The constants are pinned: a digit changed by accident would make every picture of a family look washed out."""

from dataclasses import replace
from zlib import crc32

import pytest
from diffusers import AutoencoderKLQwenImage21, AutoencoderKLWan

from app.vae.families import FAMILIES, Family, takes
from app.vae.latent_format import LatentFormat

WAN = AutoencoderKLWan(base_dim=4).config  # diffusers has the publisher's numbers as its defaults
WAN_MEAN, WAN_SCALE = tuple(WAN.latents_mean), tuple(1 / each for each in WAN.latents_std)
QWEN21 = AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4).config
QWEN21_MEAN, QWEN21_SCALE = tuple(QWEN21.latents_mean), tuple(1 / each for each in QWEN21.latents_std)
# Of Wan 2.2 only the folder's config.json has them; their digits are pinned by a checksum, below.
WAN22_MEAN, WAN22_SCALE = FAMILIES["wan22"].latent_format.shift_factor, FAMILIES["wan22"].latent_format.scaling_factor

PINNED = {
    # name: architecture, channels, scale, shift, patch, statistics, spatial factor
    "sd1": ("kl", 4, 0.18215, 0.0, 1, False, 8),
    "sd2": ("kl", 4, 0.18215, 0.0, 1, False, 8),
    "sdxl": ("kl", 4, 0.13025, 0.0, 1, False, 8),
    "sd3": ("kl", 16, 1.5305, 0.0609, 1, False, 8),
    "flux": ("kl", 16, 0.3611, 0.1159, 1, False, 8),
    "flux2": ("kl", 32, 1.0, 0.0, 2, True, 8),
    "wan21": ("wan21", 16, WAN_SCALE, WAN_MEAN, 1, False, 8),
    "wan22": ("wan22", 48, WAN22_SCALE, WAN22_MEAN, 1, False, 16),
    "qwenimage21": ("qwenimage21", 64, QWEN21_SCALE, QWEN21_MEAN, 1, False, 16),
    "latentd-small": ("kl", 4, 1.0, 0.0, 1, False, 8),
    "sana": ("dc", 32, 0.41407, 0.0, 1, False, 32),
    "hunyuanimage": ("hunyuan", 64, 0.75289, 0.0, 1, False, 32),
    "taesd": ("tiny", 4, 1.0, 0.0, 1, False, 8),
    "taesdxl": ("tiny", 4, 1.0, 0.0, 1, False, 8),
    "taesd3": ("tiny", 16, 1.0, 0.0, 1, False, 8),
    "taef1": ("tiny", 16, 1.0, 0.0, 1, False, 8),
    "taef2": ("tiny", 32, 1.0, 0.0, 2, False, 8),
    "taesana": ("tiny", 32, 1.0, 0.0, 1, False, 32),
}


def test_every_row_is_pinned():
    assert FAMILIES.keys() == PINNED.keys()


@pytest.mark.parametrize("name", PINNED)
def test_constants(name):
    row = FAMILIES[name]
    form = row.latent_format
    assert row.name == name
    assert PINNED[name] == (
        row.architecture,
        row.latent_channels,
        form.scaling_factor,
        form.shift_factor,
        form.patch,
        form.statistics,
        row.spatial_factor,
    )


@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_numbers_per_channel_are_as_many(row):
    for constant in (row.latent_format.scaling_factor, row.latent_format.shift_factor):
        assert not isinstance(constant, tuple) or len(constant) == row.channels("scaled")


def test_constants_of_wan_22():
    assert isinstance(WAN22_MEAN, tuple)
    assert isinstance(WAN22_SCALE, tuple)
    deviations = tuple(round(1 / each, 4) for each in WAN22_SCALE)
    assert [crc32(repr(numbers).encode()) for numbers in (WAN22_MEAN, deviations)] == [1769105949, 4049137]


@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_pixel_range_is_the_architecture_s(row):
    assert row.pixel_range == ((0.0, 1.0) if row.architecture == "tiny" else (-1.0, 1.0))


def test_packed_families_pad_to_whole_patches():
    assert FAMILIES["flux2"].size_multiple == 16
    assert FAMILIES["sd1"].size_multiple == 8
    assert FAMILIES["taesana"].size_multiple == 32


def test_only_our_own_is_found_by_name_alone():
    assert [row.name for row in FAMILIES.values() if row.by_name] == ["latentd-small"]


def test_a_row_is_a_value():
    assert Family("x", "kl", 4) == Family("x", "kl", 4, LatentFormat())


@pytest.mark.parametrize(
    ("model", "latents", "scaled", "raw"),
    [
        ("sd1", "sd1", True, True),
        ("sd2", "sd1", True, True),  # one latent space, the same constants
        ("sd1", "sd2", True, True),
        ("sdxl", "sd1", False, False),
        ("flux", "sd3", False, False),
        ("latentd-small", "sd1", False, False),
        ("sd1", "latentd-small", False, False),
        ("taesd", "sd1", True, False),  # a preview of what the diffusion model sees
        ("taesd", "sd2", True, False),
        ("taesdxl", "sdxl", True, False),
        ("taesd3", "sd3", True, False),
        ("taef1", "flux", True, False),
        ("taef2", "flux2", True, False),
        ("sd1", "taesd", False, False),  # not the other way round
        ("flux2", "taef2", False, False),
        ("taesd", "sdxl", False, False),
        ("taesdxl", "taesd", False, False),
        ("taesana", "sdxl", False, False),
        ("taesana", "sana", True, False),
        ("sana", "taesana", False, False),
        ("custom", "custom", True, True),
        ("custom", "sd1", False, False),
        ("sd1", "custom", False, False),
        ("sd1", "nobody", False, False),
    ],
)
def test_which_latents_a_family_decodes(model, latents, scaled, raw):
    assert takes(model, latents, "scaled") is scaled
    assert takes(model, latents, "raw") is raw


def test_every_tiny_family_shows_a_full_one():
    full = {row.space for row in FAMILIES.values() if row.architecture != "tiny"}
    assert {row.space for row in FAMILIES.values()} == full


def test_what_a_diffusion_model_sees_does_not_tell_rows_apart():
    """Identification asks whether rows are equal but for their names: TAESD and TAESDXL have one shape."""
    assert replace(FAMILIES["taesd"], name="") == replace(FAMILIES["taesdxl"], name="")
    assert replace(FAMILIES["taesd3"], name="") == replace(FAMILIES["taef1"], name="")
