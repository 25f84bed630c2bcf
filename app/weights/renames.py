"""The one rename table: every layout of autoencoder keys -> the LDM names, which are our networks' attributes.

LDM names pass through unchanged, so nothing has to find out first which layout a file has. Facts: the key lists of
diffusers' AutoencoderKL (names before and after its 0.17) and AutoencoderTiny, and of CompVis latent-diffusion.
"""

import re
from collections.abc import Iterable
from typing import Literal

from app.errors import UnsupportedCheckpoint

TABLE = (
    # diffusers, LDM: runs of whole components of a key, applied in this order in either direction
    ("down_blocks", "down"),
    ("up_blocks", "up"),  # numbered from the other end, see _flip
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)

OLDER = (
    # other names for the same things, one way only
    ("query", "q"),
    ("key", "k"),
    ("value", "v"),
    ("proj_attn", "proj_out"),
    ("encoder.quant_conv", "quant_conv"),  # FLUX.2 as its makers publish it
    ("decoder.post_quant_conv", "post_quant_conv"),
)

PREFIXES = ("first_stage_model.", "vae.")  # under which a full checkpoint keeps its autoencoder
DROPPED = ("loss.", "model_ema.", "vae_scale", "vae_shift")  # training's, and ComfyUI's constants beside a TAESD
HALVES = ("encoder", "decoder")

Layout = Literal["ldm", "diffusers"]

LINEAR = re.compile(r".*\.attn_1\.(?:q|k|v|proj_out)\.weight")
"""LDM names of the attention's weights: (C, C, 1, 1) there, linear layers (C, C) in diffusers."""

LONG = re.compile(r"\d{5,}")
"""Not the number of a layer: in a file's key, it may have more digits than Python makes an integer of."""

NUMBERED = re.compile(r"\d+\.")
TINY = re.compile(r"(?:taesd_)?(encoder|decoder)\.(layers\.)?(\d+)\.(.+)")
UP = re.compile(r"(decoder\.up)\.(\d+)\.")
DIFFUSERS_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.")


def prefix_of(keys: Iterable[str]) -> str:
    """What stands before the autoencoder's keys in a full checkpoint; empty in a file of its own."""
    keys = list(keys)
    return next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys)), "")


def half_of(stem: str) -> str | None:
    """`encoder` or `decoder` for the stem of a half's file, as in taesd_encoder."""
    return next((half for half in HALVES if stem.endswith(f"_{half}")), None)


def canonical_keys(keys: Iterable[str], stem: str = "") -> dict[str, str]:
    """{key of the file: LDM name} of the autoencoder in it; keys that are no autoencoder's business are left out.

    In a file with one of PREFIXES only the keys behind it count. Keys of no known layout keep their name: the
    strict load then names them. The file's stem says which half of a tiny autoencoder bare numbers are; raises
    UnsupportedCheckpoint where it does not.
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
    levels = 1 + max((int(m[1]) for name in inner.values() if (m := DIFFUSERS_UP.match(name))), default=-1)
    return {key: _ldm_name(name, levels) for key, name in inner.items()}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{LDM name: diffusers key}: the table read from right to left, for writing a diffusers folder."""
    names = list(names)
    levels = 1 + max((int(m[2]) for name in names if (m := UP.match(name))), default=-1)
    return {name: _diffusers_name(name, levels) for name in names}


def layout_of(keys: Iterable[str], stem: str = "") -> Layout:
    """`ldm` where the autoencoder's keys are the LDM names, up to what stands before them; else `diffusers`.

    Raises UnsupportedCheckpoint, as `canonical_keys`.
    """
    keys = list(keys)
    prefix = prefix_of(keys)
    names = canonical_keys(keys, stem).items()
    same = all(key.endswith(name) or name.endswith(key.removeprefix(prefix)) for key, name in names)
    return "ldm" if same else "diffusers"


def layout_shape(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape that a tensor of this LDM name has in a layout, given the one that it has in either."""
    if not LINEAR.fullmatch(name):
        return shape
    return shape[:2] if layout == "diffusers" else (*shape[:2], 1, 1)


def is_tiny(names: Iterable[str]) -> bool:
    """Whether these LDM names are those of a tiny autoencoder: numbered layers."""
    return any(TINY.match(name) for name in names)


def _ldm_name(key: str, levels: int) -> str:
    if match := TINY.fullmatch(key):
        half, layers, index, rest = match.groups()
        # diffusers clamps latents outside of its layers, TAESD in its layer 0: diffusers' numbers are one lower
        shift = 1 if layers and half == "decoder" else 0
        return f"{half}.{int(index) + shift}.{rest}"
    flip = bool(DIFFUSERS_UP.match(key))
    for old, new in (*TABLE, *OLDER):
        key = _replace(key, old, new)
    return _flip(key, levels) if flip else key


def _diffusers_name(name: str, levels: int) -> str:
    if match := TINY.fullmatch(name):
        half, _, index, rest = match.groups()
        return f"{half}.layers.{int(index) - (half == 'decoder')}.{rest}"
    name = _flip(name, levels)
    for new, old in TABLE:
        name = _replace(name, old, new)
    return name


def _flip(name: str, levels: int) -> str:
    """LDM numbers the decoder's levels from the finest, diffusers from the coarsest."""
    return UP.sub(lambda match: f"{match[1]}.{levels - 1 - int(match[2])}.", name)


def _replace(key: str, old: str, new: str) -> str:
    return f".{key}.".replace(f".{old}.", f".{new}.")[1:-1]
