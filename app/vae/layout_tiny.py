"""The keys of an AutoencoderTiny in every layout: TAESD's, which are the attributes of our network, and diffusers'.

Facts: github.com/madebyollin/taesd, ComfyUI's file of both halves, diffusers' AutoencoderTiny (0.42).
"""

import re
from collections.abc import Iterable, Sequence

from app.vae.autoencoder_tiny import TinyConfig, TinyLayer
from app.vae.layout import unlike

KEY = re.compile(r"(?:taesd_)?(encoder|decoder)\.(layers\.)?(\d+)\.(.+)")


def taesd_keys(keys: Iterable[str]) -> dict[str, str]:
    """{key in any layout: TAESD's name}; a key of no known layout keeps its name."""
    return {key: _taesd_name(key) for key in keys}


def diffusers_keys(names: Iterable[str]) -> dict[str, str]:
    """{TAESD's name: diffusers key}."""
    return {name: _diffusers_name(name) for name in names}


def _taesd_name(key: str) -> str:
    match = KEY.fullmatch(key)
    if match is None:
        return key
    half, layers, index, rest = match.groups()
    # diffusers clamps latents outside of its layers, TAESD in its layer 0: diffusers' numbers are one lower
    shift = 1 if layers and half == "decoder" else 0
    return f"{half}.{int(index) + shift}.{rest}"


def _diffusers_name(name: str) -> str:
    match = KEY.fullmatch(name)
    if match is None:
        return name
    half, _, index, rest = match.groups()
    return f"{half}.layers.{int(index) - (half == 'decoder')}.{rest}"


def diffusers_config(config: TinyConfig, sound: bool) -> dict[str, object]:
    """What diffusers' config.json says of such a network, which is sound in fp16 or is not written at all.

    Raises UnsupportedCheckpoint where its class does not build it.
    """
    encoder, decoder = _stages(config.encoder), _stages(config.decoder)
    wide, narrow = config.encoder[0].c_out, config.decoder[0].c_out
    if config != TinyConfig(
        _encoder(encoder, wide, config.latent_channels), _decoder(decoder, narrow, config.latent_channels)
    ):
        raise unlike("layers that its AutoencoderTiny has no option for")
    return {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "block_out_channels": [narrow] * len(decoder),
        "decoder_block_out_channels": [narrow] * len(decoder),
        "encoder_block_out_channels": [wide] * len(encoder),
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": decoder,
        "num_encoder_blocks": encoder,
        "out_channels": 3,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }


def _stages(layers: Sequence[TinyLayer]) -> list[int]:
    """Blocks between each two convolutions of a half."""
    counts = [0]
    for layer in layers[1:-1]:
        if layer.block:
            counts[-1] += 1
        else:
            counts.append(0)
    return counts


def _encoder(stages: Sequence[int], width: int, latent: int) -> tuple[TinyLayer, ...]:
    """The layers of diffusers' EncoderTiny with so many blocks per stage."""
    layers, index = [TinyLayer(0, 3, width)], 1
    for stage, blocks in enumerate(stages):
        if stage:
            layers.append(TinyLayer(index, width, width, bias=False, stride=2))
            index += 1
        layers += [TinyLayer(index + block, width, width, block=True) for block in range(blocks)]
        index += blocks
    return (*layers, TinyLayer(index, width, latent))


def _decoder(stages: Sequence[int], width: int, latent: int) -> tuple[TinyLayer, ...]:
    """The layers of diffusers' DecoderTiny, numbered as TAESD's: activations and up-samplings count."""
    layers, index = [TinyLayer(1, latent, width, relu=True)], 3
    for stage, blocks in enumerate(stages):
        if stage:
            layers.append(TinyLayer(index + 1, width, width, bias=False, up=True))
            index += 2
        layers += [TinyLayer(index + block, width, width, block=True) for block in range(blocks)]
        index += blocks
    return (*layers, TinyLayer(index, width, 3))
