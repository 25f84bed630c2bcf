"""The latent caches that kohya's sd-scripts reads: names, keys and conventions of its `.npz` files.

As of its version of February 2026: a file is named by its picture and the picture's size as stored; SD 1.x, 2.x and
SDXL have plain keys and latents before scaling, SD3 and FLUX keys that name the latent's size, FLUX scaled latents.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.errors import InvalidInput
from app.terms import Convention
from app.tools.buckets import Cut, Size
from app.wire.arrays.npy import write_npy
from app.wire.arrays.npz import write_zip
from app.wire.arrays.spec import Values


@dataclass(frozen=True)
class Form:
    """How the latents of one family are kept."""

    suffix: str
    convention: Convention
    sized: bool  # keys end in the latent's size, so that one file can hold several


FORMS = {
    "sd1": Form("_sd.npz", "raw", sized=False),
    "sd2": Form("_sd.npz", "raw", sized=False),
    "sdxl": Form("_sdxl.npz", "raw", sized=False),
    "sd3": Form("_sd3.npz", "raw", sized=True),
    "flux": Form("_flux.npz", "scaled", sized=True),
}


def form_of(family: str | None) -> Form:
    """Raises InvalidInput for a family that sd-scripts has no cache of."""
    form = FORMS.get(family or "")
    if form is None:
        raise InvalidInput(f"--format kohya is for {', '.join(FORMS)}; the model is {family}")
    return form


def file_name(stem: str, size: Size, form: Form) -> str:
    """`cat_1500x1000_sdxl.npz`, of a picture that is stored at this size."""
    return f"{stem}_{size[0]:04}x{size[1]:04}{form.suffix}"


def existing(folder: Path, form: Form) -> Mapping[Path, Path]:
    """Files of a folder by their picture's path in it, without a suffix; one walk, as names tell sizes."""
    named = re.compile(rf"(.+)_\d{{4,}}x\d{{4,}}{re.escape(form.suffix)}", re.ASCII)
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            if told := named.fullmatch(name):
                found[Path(top, told[1])] = Path(top, name)
    return found


def write(form: Form, latent: Values, flipped: Values | None, cut: Cut) -> bytes:
    """The file of one latent (C, h, w) and of its mirrored twin's, as float32."""
    key = f"_{latent.shape[1]}x{latent.shape[2]}" if form.sized else ""
    arrays = {
        "latents": latent.astype(np.float32),
        "original_size": np.array(cut.original),
        "crop_ltrb": np.array(crop_ltrb(cut.original, cut.bucket)),
    }
    if flipped is not None:
        arrays["latents_flipped"] = flipped.astype(np.float32)
    return write_zip([(f"{name}{key}.npy", write_npy(array)) for name, array in arrays.items()])


def crop_ltrb(original: Size, bucket: Size) -> tuple[float, float, float, float]:
    """What SDXL is conditioned on: the largest box of the picture's aspect in the bucket, pushed to whole pixels."""
    aspect = original[0] / original[1]
    wide, high = bucket
    width, height = (high * aspect, high) if wide / high > aspect else (wide, wide / aspect)
    left, top = (wide - width) // 2, (high - height) // 2
    return left, top, left + width, top + height
