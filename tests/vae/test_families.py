"""The constants are pinned: a digit changed by accident would make every picture of a family look washed out."""

import pytest

from app.vae.families import FAMILIES, Family
from app.vae.latent_format import LatentFormat

PINNED = {
    # name: architecture, channels, scale, shift, patch, statistics, spatial factor
    "sd1": ("kl", 4, 0.18215, 0.0, 1, False, 8),
    "sd2": ("kl", 4, 0.18215, 0.0, 1, False, 8),
    "sdxl": ("kl", 4, 0.13025, 0.0, 1, False, 8),
    "sd3": ("kl", 16, 1.5305, 0.0609, 1, False, 8),
    "flux": ("kl", 16, 0.3611, 0.1159, 1, False, 8),
    "flux2": ("kl", 32, 1.0, 0.0, 2, True, 8),
    "latentd-small": ("kl", 4, 1.0, 0.0, 1, False, 8),
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
def test_pixel_range_is_the_architecture_s(row):
    assert row.pixel_range == ((-1.0, 1.0) if row.architecture == "kl" else (0.0, 1.0))


def test_packed_families_pad_to_whole_patches():
    assert FAMILIES["flux2"].size_multiple == 16
    assert FAMILIES["sd1"].size_multiple == 8
    assert FAMILIES["taesana"].size_multiple == 32


def test_only_our_own_is_found_by_name_alone():
    assert [row.name for row in FAMILIES.values() if row.by_name] == ["latentd-small"]


def test_a_row_is_a_value():
    assert Family("x", "kl", 4) == Family("x", "kl", 4, LatentFormat())
