"""The configurations that we write are those with which diffusers builds the very network."""

import pytest
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny

from app.errors import UnsupportedCheckpoint
from app.store.checkpoint import blank
from app.store.family import Config
from app.store.store import open_checkpoint
from app.tools.diffusers_config import diffusers_config
from app.vae.autoencoder_tiny import TinyConfig, TinyLayer
from tests.store.weights import as_diffusers, state_of, write

CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLFlux2": AutoencoderKLFlux2, "AutoencoderTiny": AutoencoderTiny}


def config_of(tmp_path, state, metadata):
    return diffusers_config(open_checkpoint(write(tmp_path / "a.safetensors", state, metadata), "sd1"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {}),
        ("sd1", {"encoder_depth": 2, "decoder_depth": 3, "encoder_widths": (32, 64), "decoder_widths": (32, 64)}),
        ("sd1", {"mid_attention": False}),
        ("sd1", {"quant_conv": False}),
        ("sd3", {}),
        ("latentd-small", {}),
        ("flux2", {}),
        ("flux2", {"decoder_widths": (64,) * 4}),
        ("taesd", {}),
        ("taesd3", {"width": 8}),
    ],
)
def test_diffusers_builds_these_very_shapes(tmp_path, family, changes):
    state = state_of(family, **changes)
    metadata = {"family": family} if "encoder_widths" not in changes else {"scaling_factor": "0.5"}
    content = config_of(tmp_path, state, metadata)
    model = CLASSES[str(content["_class_name"])].from_config(content)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert theirs == {key: tuple(value.shape) for key, value in as_diffusers(state).items()}


def tiny(encoder_blocks, decoder_blocks, width=4) -> TinyConfig:
    """What diffusers makes of these options, read off its keys: a stage without blocks too."""
    model = AutoencoderTiny(
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
        encoder_block_out_channels=(width,) * len(encoder_blocks),
        decoder_block_out_channels=(width,) * len(decoder_blocks),
    )
    from app.weights.renames import canonical_keys

    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return TinyConfig.from_shapes({name: shapes[key] for key, name in canonical_keys(shapes).items()})


@pytest.mark.parametrize("blocks", [((1, 3, 3, 3), (3, 3, 3, 1)), ((0, 1, 2), (2, 1, 1)), ((2, 0), (1, 0))])
def test_stages_are_counted_as_diffusers_numbers_them(tmp_path, blocks):
    config: Config = tiny(*blocks)
    state = {key: value.new_zeros(value.shape, device="cpu") for key, value in blank(config).state_dict().items()}
    content = config_of(tmp_path, state, {"scaling_factor": "0.5"})
    assert content["num_encoder_blocks"] == list(blocks[0])
    assert content["num_decoder_blocks"] == list(blocks[1])


def test_layers_that_it_has_no_option_for(tmp_path):
    config = tiny((1, 1, 1, 1), (1, 1, 1, 1))
    wider = TinyConfig(
        encoder=config.encoder,
        decoder=(*config.decoder[:-2], TinyLayer(config.decoder[-2].index, 4, 8, block=True), TinyLayer(13, 8, 3)),
    )
    state = {key: value.new_zeros(value.shape, device="cpu") for key, value in blank(wider).state_dict().items()}
    with pytest.raises(UnsupportedCheckpoint, match="no class of diffusers has layers"):
        config_of(tmp_path, state, {"family": "taesd"})


def test_a_file_known_to_be_sound_in_half_may_stay_in_half(tmp_path, monkeypatch):
    from app.store import identity as describe
    from app.store.known import Known

    assert config_of(tmp_path, state_of(), {})["force_upcast"] is True
    monkeypatch.setattr(describe, "lookup", lambda *_: Known("x", "0", "sd1", "ok"))
    assert config_of(tmp_path, state_of(), {})["force_upcast"] is False
