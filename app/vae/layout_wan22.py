"""The keys of the VAEs of Wan 2.2 and Qwen-Image 2.1 in every layout: Wan 2.1's outside of the levels, nested inside.

Facts: diffusers' AutoencoderKLWan and AutoencoderKLQwenImage21 (0.42); the size of wan2.2_vae.safetensors to the byte.
"""

import re
from collections.abc import Iterable

from app.vae.autoencoder import Shape, Shapes
from app.vae.autoencoder_wan import DEPTH
from app.vae.autoencoder_wan22 import Wan22Config
from app.vae.layout import unlike
from app.vae.layout_wan import BLOCK, begun, outer_key, outer_name, swapped

THEIRS = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)sampler)\.(.+)")
OURS = re.compile(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
TOLD = re.compile(
    r"(?:encoder\.downsamples|decoder\.upsamples)\.0\.(?:down|up)samples\.0\.residual\."
    r"|(?:encoder\.down|decoder\.up)_blocks\.0\.(?:down|up)sampler\.resample\."
)
LEVEL = re.compile(r"(?:encoder|decoder)\.(?:down|up)(?:samples|_blocks)\.(\d+)\.")
RESAMPLING = ("resample.", "time_conv.")  # layers of a level's last part begin so


def levels(shapes: Shapes) -> int:
    """How many levels either half has, in either layout; 0 where it is no such VAE."""
    if not any(TOLD.match(key) for key in shapes):
        return 0
    return 1 + max(int(match[1]) for key in shapes if (match := LEVEL.match(key)))


def wan22_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key in any layout: the publisher's name}; a key of no known layout keeps its name."""
    return {key: _name(key) for key in keys}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{publisher's name: diffusers key}."""
    return {name: _key(name) for name in names}


def flat_shape(name: str, shape: Shape) -> Shape:
    """The canonical shape in Qwen-Image 2.1, whose kernels have two sides: some files give them a third, of one tap."""
    if name.endswith(".gamma") and shape:
        return (shape[0], 1, 1) if ".middle.1." in name else (shape[0], 1, 1, 1)
    return (*shape[:2], *shape[3:]) if len(shape) == 5 and shape[2] == 1 else shape


def deep_shape(name: str, shape: Shape) -> Shape:
    """The same shape in Wan 2.2, for diffusers. Raises UnsupportedCheckpoint for a file that is for pictures alone."""
    if name == "encoder.conv1.weight" and len(shape) != 5:
        raise unlike("kernels of two dimensions in the VAE of Wan 2.2")
    return shape


def diffusers_config(config: Wan22Config, _: bool) -> dict[str, object]:
    """What diffusers' config.json says of such a network; how fp16 does is none of its options."""
    channels = config.pixel_channels * config.patch**2
    return {
        "_class_name": "AutoencoderKLWan" if config.patch > 1 else "AutoencoderKLQwenImage21",
        "attn_scales": [],
        "base_dim": config.encoder_width,
        "decoder_base_dim": config.decoder_width,
        "dim_mult": list(config.multiples),
        "dropout": 0.0,
        "in_channels": channels,
        "is_residual": True,
        "num_res_blocks": DEPTH,
        "out_channels": channels,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_spatial": config.spatial_factor,
        "temperal_downsample": [level > 0 for level in range(config.levels - 1)],
        "z_dim": config.latent_channels,
    }


def _name(key: str) -> str:
    match = THEIRS.fullmatch(key)
    if match is None:
        return outer_name(key)
    way = match[1].rpartition(".")[2]
    last = DEPTH if way == "down" else DEPTH + 1
    return f"{match[1]}samples.{match[2]}.{way}samples.{match[3] or last}.{begun(match[4], BLOCK)}"


def _key(name: str) -> str:
    match = OURS.fullmatch(name)
    if match is None:
        return outer_key(name)
    way = match[1].rpartition(".")[2]
    part = f"{way}sampler" if match[4].startswith(RESAMPLING) else f"resnets.{match[3]}"
    return f"{match[1]}_blocks.{match[2]}.{part}.{begun(match[4], swapped(BLOCK).items())}"
