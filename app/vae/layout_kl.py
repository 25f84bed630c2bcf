"""The keys of an AutoencoderKL in every layout: LDM's, which are the attributes of our network, and diffusers'.

LDM names pass through unchanged. Facts: the key lists and constructors of diffusers' AutoencoderKL (names before and
after its 0.17) and AutoencoderKLFlux2, diffusers 0.42, and of CompVis latent-diffusion.
"""

import re
from collections.abc import Iterable

from app.vae.autoencoder import Shape
from app.vae.autoencoder_kl import BATCH_NORM_EPS, PATCH, KLConfig
from app.vae.layout import replaced, unlike

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

LINEAR = re.compile(r".*\.attn_1\.(?:q|k|v|proj_out)\.weight")
"""LDM names of the attention's weights: (C, C, 1, 1) there, linear layers (C, C) in diffusers."""

UP = re.compile(r"(decoder\.up)\.(\d+)\.")
DIFFUSERS_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.")
SAMPLE_SIZE = 512  # pixels; diffusers' own tiling alone reads it


def ldm_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key in any layout: LDM name}; a key of no known layout keeps its name."""
    keys = list(keys)
    levels = 1 + max((int(m[1]) for key in keys if (m := DIFFUSERS_UP.match(key))), default=-1)
    return {key: _ldm_name(key, levels) for key in keys}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{LDM name: diffusers key}: the table read from right to left."""
    names = list(names)
    levels = 1 + max((int(m[2]) for name in names if (m := UP.match(name))), default=-1)
    return {name: _diffusers_name(name, levels) for name in names}


def ldm_shape(name: str, shape: Shape) -> Shape:
    """The shape that a tensor of this LDM name has in our network, given the one that it has in any layout."""
    return (*shape, 1, 1) if len(shape) == 2 and LINEAR.fullmatch(name) else shape


def diffusers_shape(name: str, shape: Shape) -> Shape:
    """The shape that it has in diffusers, given the one in our network."""
    return shape[:2] if LINEAR.fullmatch(name) else shape


def diffusers_config(config: KLConfig, sound: bool) -> dict[str, object]:
    """What diffusers' config.json says of such a network; `sound` where fp16 is known to do.

    Raises UnsupportedCheckpoint where no class of diffusers builds it.
    """
    levels = len(config.encoder_widths)
    if config.decoder_depth != config.encoder_depth + 1:
        raise unlike(
            f"{config.encoder_depth} blocks a level in the encoder and {config.decoder_depth} in the decoder, "
            "where diffusers has one more in the decoder"
        )
    content: dict[str, object] = {
        "_class_name": "AutoencoderKLFlux2" if config.batch_norm else "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.encoder_widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.encoder_depth,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "out_channels": 3,
        "sample_size": SAMPLE_SIZE,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
    }
    if config.batch_norm:
        content |= {"batch_norm_eps": BATCH_NORM_EPS, "patch_size": [PATCH, PATCH]}
        if config.decoder_widths != config.encoder_widths:
            content["decoder_block_out_channels"] = list(config.decoder_widths)
        return content
    if config.decoder_widths != config.encoder_widths:
        raise unlike(f"{config.encoder_widths} channels in the encoder and {config.decoder_widths} in the decoder")
    return content | {"force_upcast": not sound}  # whether its pipelines leave fp16 for the VAE


def _ldm_name(key: str, levels: int) -> str:
    flip = bool(DIFFUSERS_UP.match(key))
    key = replaced(key, (*TABLE, *OLDER))
    return _flip(key, levels) if flip else key


def _diffusers_name(name: str, levels: int) -> str:
    return replaced(_flip(name, levels), ((ldm, diffusers) for diffusers, ldm in TABLE))


def _flip(name: str, levels: int) -> str:
    """LDM numbers the decoder's levels from the finest, diffusers from the coarsest."""
    return UP.sub(lambda match: f"{match[1]}.{levels - 1 - int(match[2])}.", name)
