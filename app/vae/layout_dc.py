"""The keys of an AutoencoderDC in every layout: its publisher's, which are our network's but for qkv, and diffusers'.

Facts: github.com/mit-han-lab/efficientvit, and diffusers' AutoencoderDC and its converter
(`convert_autoencoder_dc_checkpoint_to_diffusers`, 0.42).
"""

import re
from collections.abc import Iterable

from app.vae.autoencoder import Shape
from app.vae.autoencoder_dc import COLOURS, DCConfig, DCHalf
from app.vae.layout import unlike

KEY = re.compile(r"(?:encoder|decoder)\.(?:stages\.\d+\.op_list\.|(?:down|up)_blocks\.\d+\.\d+\.|project_(?:in|out)\.)")
"""How keys of no other autoencoder begin."""

PARTS = ("context_module.main.qkv.conv.weight", tuple(f"context_module.main.to_{each}.weight" for each in "qkv"))
"""The end of a key of the publisher's, and those of its thirds."""

EXPECTS = {
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "decoder_conv_act_fn": "relu",
}
"""What our network has of the options of diffusers that no shape tells."""

ENDS = (
    # diffusers, publisher: whole keys but for weight and bias
    ("encoder.conv_in", "encoder.project_in.conv"),
    ("encoder.conv_in.conv", "encoder.project_in.conv"),  # where it takes a step too
    ("encoder.conv_out", "encoder.project_out.main.op_list.0.conv"),
    ("decoder.conv_in", "decoder.project_in.main.conv"),
    ("decoder.norm_out", "decoder.project_out.op_list.0"),
    ("decoder.conv_out", "decoder.project_out.op_list.2.conv"),
    ("decoder.conv_out.conv", "decoder.project_out.op_list.2.conv.conv"),
)

INNER = (
    # diffusers, publisher: the same inside of a block
    ("conv1", "main.conv1.conv"),
    ("conv2", "main.conv2.conv"),
    ("norm", "main.conv2.norm"),
    ("attn.to_q", "context_module.main.to_q"),
    ("attn.to_k", "context_module.main.to_k"),
    ("attn.to_v", "context_module.main.to_v"),
    ("attn.to_qkv_multiscale.0.proj_in", "context_module.main.aggreg.0.0"),
    ("attn.to_qkv_multiscale.0.proj_out", "context_module.main.aggreg.0.1"),
    ("attn.to_out", "context_module.main.proj.conv"),
    ("attn.norm_out", "context_module.main.proj.norm"),
    ("conv_out.conv_inverted", "local_module.main.inverted_conv.conv"),
    ("conv_out.conv_depth", "local_module.main.depth_conv.conv"),
    ("conv_out.conv_point", "local_module.main.point_conv.conv"),
    ("conv_out.norm", "local_module.main.point_conv.norm"),
)
STEPS = {"encoder": ("conv", "main.conv"), "decoder": ("conv", "main.conv.conv")}

DIFFUSERS = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)\.(weight|bias)")
PUBLISHED = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)\.(weight|bias)")
NESTED = re.compile(r"(encoder\.(?:stages\.\d+\.op_list\.\d+\.main|project_in)\.conv)\.conv\.")
"""The publisher's name of a step that moves space to channels; here it has that of one with a stride."""

LINEAR = re.compile(r".*\.context_module\.main\.(?:to_[qkv]|proj\.conv)\.weight")
"""Canonical names of convolutions (C, C', 1, 1), linear layers (C, C') in diffusers."""


def published_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key in any layout: canonical name}; a key of no known layout keeps its name."""
    return {key: _published(key) for key in keys}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{canonical name: diffusers key}."""
    names = list(names)
    steps = not any(name.startswith("encoder.stages.0.") for name in names)  # the first convolution takes one
    ends = {theirs: ours for ours, theirs in ENDS if ours != ("encoder.conv_in" if steps else "encoder.conv_in.conv")}
    return {name: _diffusers(name, ends) for name in names}


def canonical_shape(name: str, shape: Shape) -> Shape:
    """The shape that a tensor of this canonical name has in our network, given the one that it has in any layout."""
    return (*shape, 1, 1) if len(shape) == 2 and LINEAR.fullmatch(name) else shape


def diffusers_shape(name: str, shape: Shape) -> Shape:
    """The shape that it has in diffusers, given the one in our network."""
    return shape[:2] if LINEAR.fullmatch(name) else shape


def _published(key: str) -> str:
    stem, _, kind = key.rpartition(".")
    if end := dict(ENDS).get(stem):
        return f"{end}.{kind}"
    match = DIFFUSERS.fullmatch(key)
    if match is None:
        return NESTED.sub(r"\1.", key)
    half, level, index, inner, kind = match.groups()
    return f"{half}.stages.{level}.op_list.{index}.{dict((*INNER, STEPS[half])).get(inner, inner)}.{kind}"


def _diffusers(name: str, ends: dict[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in ends:
        return f"{ends[stem]}.{kind}"
    match = PUBLISHED.fullmatch(name)
    if match is None:
        return name
    half, level, index, inner, kind = match.groups()
    way = "down" if half == "encoder" else "up"
    names = {theirs: ours for ours, theirs in (*INNER, STEPS[half])}
    return f"{half}.{way}_blocks.{level}.{index}.{names.get(inner, inner)}.{kind}"


def diffusers_config(config: DCConfig, sound: bool) -> dict[str, object]:
    """What diffusers' config.json says of such a network.

    Raises UnsupportedCheckpoint where its class does not build it.
    """
    if config.encoder.head != config.decoder.head:
        raise unlike(f"heads of {config.encoder.head} channels in the encoder and {config.decoder.head} in the decoder")
    return {
        "_class_name": "AutoencoderDC",
        "attention_head_dim": config.encoder.head,
        "downsample_block_type": "pixel_unshuffle" if config.encoder.shuffles else "Conv",
        "in_channels": COLOURS,
        "latent_channels": config.latent_channels,
        "upsample_block_type": "pixel_shuffle" if config.decoder.shuffles else "interpolate",
        **EXPECTS,
        **_half("encoder", config.encoder),
        **_half("decoder", config.decoder),
    }


def _half(name: str, half: DCHalf) -> dict[str, object]:
    blocks = {"res": "ResBlock", "vit": "EfficientViTBlock"}
    return {
        f"{name}_block_out_channels": list(half.widths),
        f"{name}_block_types": [blocks[kind] for kind in half.kinds],
        f"{name}_layers_per_block": list(half.depths),
        f"{name}_qkv_multiscales": [[kernel] if kernel else [] for kernel in half.kernels],
    }
