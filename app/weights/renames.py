"""The keys of weight files -> canonical names: what every architecture's tables have in common.

Which autoencoder it is, is told from the keys as they are, up to what stands before them in a full checkpoint and to
the half that a file's name says: the same words mean other things elsewhere. The tables are the architectures' own.
"""

import re
from collections.abc import Iterable
from typing import Literal

from app.errors import UnsupportedCheckpoint
from app.vae.architectures import Architecture
from app.vae.autoencoder import Shape, Shapes

PREFIXES = ("first_stage_model.", "vae.")  # under which a full checkpoint keeps its autoencoder
WRAPPER = "model."  # before all keys of a file that has an autoencoder alone; a UNet's begin so, too
DROPPED = ("loss.", "model_ema.", "vae_scale", "vae_shift")  # training's, and ComfyUI's constants beside a TAESD
HALVES = ("encoder", "decoder")

Layout = Literal["ldm", "diffusers"]

LONG = re.compile(r"\d{5,}")
"""Not the number of a layer: in a file's key, it may have more digits than Python makes an integer of."""

NUMBERED = re.compile(r"\d+\.")


def prefix_of(keys: Iterable[str]) -> str:
    """What stands before the autoencoder's keys in a full checkpoint; empty in a file of its own."""
    keys = list(keys)
    found = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    halves = tuple(f"{WRAPPER}{half}." for half in HALVES)
    wrapped = not found and all(key.startswith(WRAPPER) for key in keys) and any(key.startswith(halves) for key in keys)
    return WRAPPER if wrapped else found


def half_of(stem: str) -> str | None:
    """`encoder` or `decoder` for the stem of a half's file, as in taesd_encoder."""
    return next((half for half in HALVES if stem.endswith(f"_{half}")), None)


def inner_keys(keys: Iterable[str], stem: str = "") -> dict[str, str]:
    """{key of the file: its name inside the autoencoder}; keys that are no autoencoder's business are left out.

    In a file with one of PREFIXES only the keys behind it count. The file's stem says which half of a tiny autoencoder
    bare numbers are; raises UnsupportedCheckpoint where it does not.
    """
    keys = list(keys)
    prefix = prefix_of(keys)
    under = ""
    if any(NUMBERED.match(key) for key in keys):
        half = half_of(stem)
        if half is None:
            raise UnsupportedCheckpoint("numbered layers without a half: the name should end in _encoder or _decoder")
        under = f"{half}."
    inner = {key: under + key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    inner = {key: name for key, name in inner.items() if not name.startswith(DROPPED)}
    if wrong := next((key for key, name in inner.items() if any(LONG.fullmatch(part) for part in name.split("."))), ""):
        raise UnsupportedCheckpoint(f"{wrong[:100]!a} is no key of an autoencoder: its number is too long")
    return inner


def inner_shapes(files: Iterable[tuple[Shapes, str]]) -> dict[str, Shape]:
    """The shapes by names inside the autoencoder that lies in these (shapes of a file, its stem), one or two.

    Raises UnsupportedCheckpoint, as `inner_keys`.
    """
    return {name: shapes[key] for shapes, stem in files for key, name in inner_keys(shapes, stem).items()}


def canonical_keys(keys: Iterable[str], architecture: Architecture, stem: str = "") -> dict[str, str]:
    """{key of the file: canonical name} of the autoencoder in it.

    Keys of no known layout keep their name: the strict load then names them. Raises UnsupportedCheckpoint, as
    `inner_keys`.
    """
    inner = inner_keys(keys, stem)
    names = architecture.keys(inner.values())
    return {key: names[name] for key, name in inner.items()}


def layout_of(keys: Iterable[str], architecture: Architecture, stem: str = "") -> Layout:
    """`ldm` where the autoencoder's keys are the canonical names, up to what stands before them; else `diffusers`.

    Raises UnsupportedCheckpoint, as `inner_keys`.
    """
    keys = list(keys)
    prefix = prefix_of(keys)
    names = canonical_keys(keys, architecture, stem).items()
    same = all(key.endswith(name) or name.endswith(key.removeprefix(prefix)) for key, name in names)
    return "ldm" if same else "diffusers"
