"""The keys and configurations of diffusers' AutoencoderKL: it builds this very network, with these very keys."""

import pytest
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from app.errors import UnsupportedCheckpoint
from app.vae.layout_kl import diffusers_config, diffusers_keys, ldm_keys
from tests.store.weights import as_diffusers, kl_config, state_of

CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLFlux2": AutoencoderKLFlux2}


def shapes_of(state):
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_diffusers_has_these_very_keys(levels):
    model = AutoencoderKL(
        block_out_channels=[32] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    ours = state_of(encoder_widths=(32,) * levels, decoder_widths=(32,) * levels)
    assert shapes_of(as_diffusers(ours)) == shapes_of(model.state_dict())


def test_diffusers_numbers_the_decoder_from_the_other_end():
    keys = [f"decoder.up_blocks.{level}.resnets.0.conv1.weight" for level in range(4)]
    assert ldm_keys(keys)[keys[0]] == "decoder.up.3.block.0.conv1.weight"
    assert ldm_keys(keys)[keys[3]] == "decoder.up.0.block.0.conv1.weight"
    assert diffusers_keys(ldm_keys(keys).values()) == {name: key for key, name in ldm_keys(keys).items()}


def test_older_attention_names():
    attention = "encoder.mid_block.attentions.0."
    older = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out", "group_norm": "norm"}
    renamed = ldm_keys([f"{attention}{name}.weight" for name in older])
    assert list(renamed.values()) == [f"encoder.mid.attn_1.{name}.weight" for name in older.values()]


def test_flux2_as_its_makers_publish_it():
    keys = ["encoder.quant_conv.weight", "decoder.post_quant_conv.bias", "bn.running_mean"]
    assert list(ldm_keys(keys).values()) == ["quant_conv.weight", "post_quant_conv.bias", "bn.running_mean"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {}),
        ("sd1", {"encoder_depth": 2, "decoder_depth": 3, "encoder_widths": (32, 64), "decoder_widths": (32, 64)}),
        ("sd1", {"mid_attention": False}),
        ("sd1", {"quant_conv": False}),
        ("sd3", {}),
        ("flux2", {}),
        ("flux2", {"decoder_widths": (64,) * 4}),
    ],
)
def test_diffusers_builds_these_very_shapes(family, changes):
    content = diffusers_config(kl_config(family, **changes), False)
    model = CLASSES[str(content["_class_name"])].from_config(content)
    assert shapes_of(model.state_dict()) == shapes_of(as_diffusers(state_of(family, **changes)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder_depth": 1}, "1 blocks a level in the encoder and 1 in the decoder"),
        ({"decoder_widths": (64,) * 4}, "channels in the encoder"),
    ],
)
def test_a_network_that_diffusers_cannot_build_is_refused(changes, reason):
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        diffusers_config(kl_config(**changes), False)
