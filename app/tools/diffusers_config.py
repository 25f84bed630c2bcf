"""The config.json of a diffusers folder: what `AutoencoderKL`, `AutoencoderKLFlux2` and `AutoencoderTiny` build from.

Facts: the constructors of these classes in diffusers 0.42.
"""

from collections.abc import Sequence

from app.errors import UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.vae.autoencoder_kl import BATCH_NORM_EPS, KLConfig
from app.vae.autoencoder_tiny import TinyConfig, TinyLayer
from app.vae.families import FAMILIES

SAMPLE_SIZE = 512  # pixels; diffusers' own tiling alone reads it


def diffusers_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The configuration with which diffusers loads these weights, in its layout.

    `_family` is ours: keys that begin with an underscore are ignored there. Raises UnsupportedCheckpoint where no
    class of diffusers builds such a network.
    """
    config = checkpoint.config
    content = _kl(checkpoint, config) if isinstance(config, KLConfig) else _tiny(config)
    family = checkpoint.family
    if family.name in FAMILIES:
        content["_family"] = family.name
    if checkpoint.family_source == "default":
        content["_family_source"] = "default"  # a guess: its constants are read back as one
    form = family.latent_format
    if not form.statistics:
        content["scaling_factor"] = form.scaling_factor
        if form.shift_factor:
            content["shift_factor"] = form.shift_factor
    return content


def _kl(checkpoint: Checkpoint, config: KLConfig) -> dict[str, object]:
    levels = len(config.encoder_widths)
    if config.decoder_depth != config.encoder_depth + 1:
        raise _unlike(
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
        patch = checkpoint.family.latent_format.patch
        content |= {"batch_norm_eps": BATCH_NORM_EPS, "patch_size": [patch, patch]}
        if config.decoder_widths != config.encoder_widths:
            content["decoder_block_out_channels"] = list(config.decoder_widths)
        return content
    if config.decoder_widths != config.encoder_widths:
        raise _unlike(f"{config.encoder_widths} channels in the encoder and {config.decoder_widths} in the decoder")
    return content | {"force_upcast": checkpoint.fp16 != "ok"}  # whether its pipelines leave fp16 for the VAE


def _tiny(config: TinyConfig) -> dict[str, object]:
    encoder, decoder = _stages(config.encoder), _stages(config.decoder)
    wide, narrow = config.encoder[0].c_out, config.decoder[0].c_out
    if config != TinyConfig(
        _encoder(encoder, wide, config.latent_channels), _decoder(decoder, narrow, config.latent_channels)
    ):
        raise _unlike("layers that its AutoencoderTiny has no option for")
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


def _unlike(what: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(f"no class of diffusers has {what}: give DST the name of a .safetensors file instead")
