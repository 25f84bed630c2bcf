"""The caches are read here as sd-scripts reads them: by names, keys and shapes that its own code looks for."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from app.errors import InvalidInput
from app.tools.buckets import Cut
from app.tools.kohya import FORMS, crop_ltrb, existing, file_name, form_of, write

CUT = Cut((1500, 1000), (768, 512), (704, 512))
LATENT = np.arange(4 * 64 * 88, dtype=np.float16).reshape(4, 64, 88)


@pytest.mark.parametrize(
    ("family", "name", "key"),
    [
        ("sd1", "cat_1500x1000_sd.npz", ""),
        ("sd2", "cat_1500x1000_sd.npz", ""),
        ("sdxl", "cat_1500x1000_sdxl.npz", ""),
        ("sd3", "cat_1500x1000_sd3.npz", "_64x88"),
        ("flux", "cat_1500x1000_flux.npz", "_64x88"),
    ],
)
def test_names_and_keys(family, name, key):
    form = form_of(family)
    assert file_name("cat", CUT.original, form) == name
    with np.load(io.BytesIO(write(form, LATENT, -LATENT, CUT))) as file:
        assert sorted(file.files) == sorted(
            f"{each}{key}" for each in ("latents", "latents_flipped", "original_size", "crop_ltrb")
        )
        latents, flipped = file[f"latents{key}"], file[f"latents_flipped{key}"]
        original, crop = file[f"original_size{key}"].tolist(), file[f"crop_ltrb{key}"].tolist()
    assert (latents.dtype, latents.shape) == (np.float32, (4, 64, 88))
    assert torch.equal(torch.FloatTensor(latents), torch.from_numpy(LATENT.astype(np.float32)))  # as it loads them
    assert np.array_equal(flipped, -latents)
    assert original == [1500, 1000]
    assert crop == [0.0, 21.0, 704.0, 21 + 704 / 1.5]


def test_without_a_twin_there_is_no_key_for_it():
    with np.load(io.BytesIO(write(FORMS["sd1"], LATENT, None, CUT))) as file:
        assert sorted(file.files) == ["crop_ltrb", "latents", "original_size"]


def test_small_sizes_have_four_digits():
    assert file_name("a", (64, 96), FORMS["sdxl"]) == "a_0064x0096_sdxl.npz"


@pytest.mark.parametrize(
    ("original", "bucket", "expected"),
    [
        ((1000, 1000), (512, 512), (0, 0, 512, 512)),
        ((1000, 1001), (512, 512), (0, 0, 512 * 1000 / 1001, 512)),
        ((1000, 1500), (448, 576), (32, 0, 32 + 384, 576)),
        ((3000, 1000), (832, 256), (32, 0, 800, 256)),
    ],
)
def test_the_crop_is_a_box_in_the_bucket(original, bucket, expected):
    assert crop_ltrb(original, bucket) == pytest.approx(expected)


def test_what_sd_scripts_has_no_cache_of_is_refused():
    for family in ("taesd", "flux2", "latentd-small", None):
        with pytest.raises(InvalidInput, match=f"the model is {family}"):
            form_of(family)


def test_caches_are_known_by_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a_0064x0096_sd.npz", "b_0064x0096_sdxl.npz", "deep/c_12000x9000_sd.npz", "d.npz", "_sd.npz"):
        (tmp_path / name).touch()
    assert existing(tmp_path, FORMS["sd1"]) == {
        tmp_path / "a": tmp_path / "a_0064x0096_sd.npz",
        tmp_path / "deep" / "c": tmp_path / "deep" / "c_12000x9000_sd.npz",
    }
    assert existing(Path(tmp_path / "none"), FORMS["sd1"]) == {}
