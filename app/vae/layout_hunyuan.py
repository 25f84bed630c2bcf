"""The keys of HunyuanImage's VAE in every layout: its publisher's, which are our network's, and diffusers'.

diffusers keeps the blocks and steps of a half in one list. Facts: its AutoencoderKLHunyuanImage (0.42) and its script
convert_hunyuan_image_to_diffusers.py.
"""

import re
from collections.abc import Iterable, Mapping

from app.vae.autoencoder import Shapes
from app.vae.autoencoder_hunyuan import COLOURS, HunyuanConfig
from app.vae.layout import replaced, unlike

EXPECTS = {"downsample_match_channel": True, "upsample_match_channel": True}
"""What our network has of the options of diffusers."""

TABLE = (
    # diffusers, publisher: runs of whole components of a key, in either direction
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("proj", "proj_out"),
)

FLAT = re.compile(r"((?:encoder\.down|decoder\.up)_blocks\.(\d+)\.)(\w+)\..+")
LEVELS = re.compile(r"((?:encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.).+")
STEP = re.compile(r"(?:encoder\.down|decoder\.up)_blocks\.\d+\.conv\.weight")
HALVES = (("encoder", "down"), ("decoder", "up"))
SAMPLE_SIZE = 384  # pixels; diffusers' own tiling alone reads it


def told(shapes: Shapes) -> bool:
    """A step of two dimensions where LDM's autoencoders have none, or one that keeps the channels."""
    ups = shapes.get("decoder.up.0.upsample.conv.weight", ())
    downs = shapes.get("encoder.down.0.downsample.conv.weight", ())
    flat = any(STEP.fullmatch(key) and len(shape) == 4 for key, shape in shapes.items())
    return flat or len(ups) == 4 or (len(downs) == 4 and downs[0] != downs[1])


def published_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key in any layout: the publisher's name}; a key of no known layout keeps its name."""
    keys = list(keys)
    places = {flat: level for half in HALVES for flat, level in _levels_of(keys, *half).items()}
    return {key: _moved(key, FLAT, places) or replaced(key, TABLE) for key in keys}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{publisher's name: diffusers key}."""
    names = list(names)
    places = {level: flat for half in HALVES for flat, level in _lists_of(names, *half).items()}
    back = [(theirs, ours) for ours, theirs in TABLE]
    return {name: _moved(name, LEVELS, places) or replaced(name, back) for name in names}


def diffusers_config(config: HunyuanConfig, sound: bool) -> dict[str, object]:
    """What diffusers' config.json says of such a network.

    Raises UnsupportedCheckpoint where its class does not build it.
    """
    if config.decoder_depth != config.encoder_depth + 1:
        raise unlike(
            f"{config.encoder_depth} blocks a level in the encoder and {config.decoder_depth} in the decoder, "
            "where diffusers has one more in the decoder"
        )
    return {
        "_class_name": "AutoencoderKLHunyuanImage",
        "block_out_channels": list(config.widths),
        "in_channels": COLOURS,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.encoder_depth,
        "out_channels": COLOURS,
        "sample_size": SAMPLE_SIZE,
        "spatial_compression_ratio": config.spatial_factor,
        **EXPECTS,
    }


def _moved(key: str, pattern: re.Pattern[str], places: Mapping[str, str]) -> str | None:
    match = pattern.fullmatch(key)
    return None if match is None else places[match[1]] + key.removeprefix(match[1])


def _levels_of(keys: Iterable[str], half: str, way: str) -> dict[str, str]:
    """{beginning in diffusers' list of a half: the publisher's}: a step ends a level."""
    found = {int(match[2]): match for key in keys if (match := FLAT.fullmatch(key)) and key.startswith(half)}
    places: dict[str, str] = {}
    level = block = 0
    for index in sorted(found):
        prefix = found[index][1]
        if found[index][3] == "conv":
            places[prefix] = f"{half}.{way}.{level}.{way}sample."
            level, block = level + 1, 0
        else:
            places[prefix] = f"{half}.{way}.{level}.block.{block}."
            block += 1
    return places


def _lists_of(names: Iterable[str], half: str, way: str) -> dict[str, str]:
    """{beginning in diffusers' list of a half: the publisher's}, from the publisher's names."""
    found = {match[1]: match for name in names if (match := LEVELS.fullmatch(name)) and name.startswith(half)}
    last = len(found)  # greater than the number of any block

    def order(prefix: str) -> tuple[int, int]:
        return int(found[prefix][2]), last if found[prefix][3] is None else int(found[prefix][3])

    return {f"{half}.{way}_blocks.{i}.": prefix for i, prefix in enumerate(sorted(found, key=order))}
