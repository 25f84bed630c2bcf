"""The keys of a Wan 2.1 VAE in every layout: the publisher's, which are the attributes of our network, and diffusers'.

Facts: the key lists of Wan2.1_VAE.pth and of diffusers' AutoencoderKLWan and AutoencoderKLQwenImage (0.42).
"""

import re
from collections.abc import Iterable

from app.vae.autoencoder import Shapes
from app.vae.autoencoder_wan import DEPTH, MULTIPLES, WanConfig
from app.vae.layout import unlike

TOP = (("quant_conv", "conv1"), ("post_quant_conv", "conv2"))  # diffusers, publisher's: first components of keys
ENDS = (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2"))  # of a half
MIDDLE = (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2"))
BLOCK = (
    # inside a residual block; resampling layers and attention have the same names in both
    ("norm1", "residual.0"),
    ("conv1", "residual.2"),
    ("norm2", "residual.3"),
    ("conv2", "residual.6"),
    ("conv_shortcut", "shortcut"),
)

HALF_END = re.compile(r"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.(.+)")
HALF_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets\.\d|attentions\.0)\.(.+)")
DOWN = re.compile(r"encoder\.down_blocks\.(\d+)\.(.+)")
UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.+)")

TOLD = re.compile(
    r"(?:encoder\.downsamples|decoder\.upsamples)\.0\.residual\.0\.gamma"
    r"|encoder\.down_blocks\.0\.norm1\.gamma"
    r"|decoder\.up_blocks\.0\.upsamplers\.0\.(?:resample|time_conv)\."
)

LAYERS = DEPTH + 2  # of a level of the decoder: its residual blocks and what enlarges


def told(shapes: Shapes) -> bool:
    """Whether either half is there, in either layout: levels without levels of their own, whose norms have a gamma."""
    return any(TOLD.match(key) for key in shapes)


def wan_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key in any layout: the publisher's name}; a key of no known layout keeps its name."""
    return {key: _name(key) for key in keys}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{publisher's name: diffusers key}."""
    return {name: _key(name) for name in names}


def diffusers_config(config: WanConfig, _: bool) -> dict[str, object]:
    """What diffusers' config.json says of such a network; how fp16 does is none of its options.

    Raises UnsupportedCheckpoint for kernels of two dimensions, and for RGBA with halves of different widths.
    """
    if config.flat:
        raise unlike("kernels of two dimensions in the VAE of Wan")
    own: dict[str, object] = {"_class_name": "AutoencoderKLWan", "decoder_base_dim": config.decoder_width}
    if config.pixel_channels != 3:
        if config.encoder_width != config.decoder_width:
            raise unlike("a VAE of Qwen-Image with halves of different widths")
        own = {"_class_name": "AutoencoderKLQwenImage", "input_channels": config.pixel_channels}
    return own | {
        "attn_scales": [],
        "base_dim": config.encoder_width,
        "dim_mult": list(MULTIPLES),
        "dropout": 0.0,
        "num_res_blocks": DEPTH,
        "temperal_downsample": [False, True, True],
        "z_dim": config.latent_channels,
    }


def outer_name(key: str) -> str:
    """The publisher's name of what lies outside of the levels, in Wan 2.2 too; other keys as they are."""
    first, _, rest = key.partition(".")
    if first in dict(TOP):
        return f"{dict(TOP)[first]}.{rest}"
    if match := HALF_END.fullmatch(key):
        return f"{match[1]}.{dict(ENDS)[match[2]]}.{match[3]}"
    if match := HALF_MIDDLE.fullmatch(key):
        return f"{match[1]}.middle.{dict(MIDDLE).get(match[2], match[2])}.{begun(match[3], BLOCK)}"
    return key


def outer_key(name: str) -> str:
    """The way back, of names outside of the levels."""
    first, _, rest = name.partition(".")
    if first in swapped(TOP):
        return f"{swapped(TOP)[first]}.{rest}"
    part, _, inner = rest.partition(".")
    if part == "middle":
        number, _, inner = inner.partition(".")
        return f"{first}.mid_block.{swapped(MIDDLE)[number]}.{begun(inner, swapped(BLOCK).items())}"
    return f"{first}.{begun(rest, swapped(ENDS).items())}"


def _name(key: str) -> str:
    if match := DOWN.fullmatch(key):
        return f"encoder.downsamples.{match[1]}.{begun(match[2], BLOCK)}"
    if match := UP.fullmatch(key):
        layer = LAYERS * int(match[1]) + (LAYERS - 1 if match[2] is None else int(match[2]))
        return f"decoder.upsamples.{layer}.{begun(match[3], BLOCK)}"
    return outer_name(key)


def _key(name: str) -> str:
    first, _, rest = name.partition(".")
    part, _, inner = rest.partition(".")
    if part not in ("downsamples", "upsamples"):
        return outer_key(name)
    number, _, inner = inner.partition(".")
    inner = begun(inner, swapped(BLOCK).items())
    if part == "downsamples":
        return f"{first}.down_blocks.{number}.{inner}"
    level, layer = divmod(int(number), LAYERS)
    kind = "upsamplers.0" if layer == LAYERS - 1 else f"resnets.{layer}"
    return f"{first}.up_blocks.{level}.{kind}.{inner}"


def swapped(table: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{publisher's: diffusers'} of a table."""
    return {ours: theirs for theirs, ours in table}


def begun(key: str, table: Iterable[tuple[str, str]]) -> str:
    """The key with its first components replaced, (old, new) by the first row that has them."""
    return next((new + key.removeprefix(old) for old, new in table if key.startswith(f"{old}.")), key)
