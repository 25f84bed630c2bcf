"""The keys and configurations of diffusers' AutoencoderTiny: it builds this very network, with these very keys."""

import pytest
from diffusers import AutoencoderTiny

from app.errors import UnsupportedCheckpoint
from app.vae.autoencoder_tiny import TinyConfig, TinyLayer
from app.vae.layout_tiny import diffusers_config, taesd_keys
from tests.store.weights import as_diffusers, state_of, tiny_config


def shapes_of(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def test_diffusers_has_these_very_keys():
    model = AutoencoderTiny(num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    assert set(as_diffusers(state_of("taesd"))) == set(model.state_dict())


@pytest.mark.parametrize(("family", "width"), [("taesd", 4), ("taesd3", 8)])
def test_diffusers_builds_these_very_shapes(family, width):
    model = AutoencoderTiny.from_config(diffusers_config(tiny_config(family, width), False))
    assert shapes_of(model.state_dict()) == shapes_of(as_diffusers(state_of(family, width=width)))


def tiny(encoder_blocks, decoder_blocks, width=4) -> TinyConfig:
    """What diffusers makes of these options, read off its keys: a stage without blocks too."""
    model = AutoencoderTiny(
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
        encoder_block_out_channels=(width,) * len(encoder_blocks),
        decoder_block_out_channels=(width,) * len(decoder_blocks),
    )
    shapes = shapes_of(model.state_dict())
    return TinyConfig.from_shapes({name: shapes[key] for key, name in taesd_keys(shapes).items()})


@pytest.mark.parametrize("blocks", [((1, 3, 3, 3), (3, 3, 3, 1)), ((0, 1, 2), (2, 1, 1)), ((2, 0), (1, 0))])
def test_stages_are_counted_as_diffusers_numbers_them(blocks):
    content = diffusers_config(tiny(*blocks), False)
    assert content["num_encoder_blocks"] == list(blocks[0])
    assert content["num_decoder_blocks"] == list(blocks[1])


def test_layers_that_it_has_no_option_for():
    config = tiny((1, 1, 1, 1), (1, 1, 1, 1))
    wider = TinyConfig(
        encoder=config.encoder,
        decoder=(*config.decoder[:-2], TinyLayer(config.decoder[-2].index, 4, 8, block=True), TinyLayer(13, 8, 3)),
    )
    with pytest.raises(UnsupportedCheckpoint, match="no class of diffusers has layers"):
        diffusers_config(wider, False)
