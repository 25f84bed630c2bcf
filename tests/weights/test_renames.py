"""The rename table against diffusers' own key lists, in both directions."""

import pytest
from diffusers import AutoencoderKL, AutoencoderTiny

from app.errors import UnsupportedCheckpoint
from app.vae.families import FAMILIES
from app.weights.renames import canonical_keys, diffusers_keys, half_of, layout_of, layout_shape
from tests.store.weights import as_diffusers, state_of


@pytest.mark.parametrize("family", FAMILIES)
def test_ldm_names_stay(family):
    names = state_of(family)
    assert canonical_keys(names) == {name: name for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family):
    names = list(state_of(family))
    there = diffusers_keys(names)
    assert len(set(there.values())) == len(names)
    assert canonical_keys(there.values()) == {key: name for name, key in there.items()}


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_diffusers_kl_has_these_very_keys(levels):
    model = AutoencoderKL(
        block_out_channels=[32] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    ours = state_of(encoder_widths=(32,) * levels, decoder_widths=(32,) * levels)
    assert set(as_diffusers(ours)) == set(model.state_dict())
    assert {key: tuple(value.shape) for key, value in as_diffusers(ours).items()} == {
        key: tuple(value.shape) for key, value in model.state_dict().items()
    }


def test_diffusers_numbers_the_decoder_from_the_other_end():
    keys = [f"decoder.up_blocks.{level}.resnets.0.conv1.weight" for level in range(4)]
    assert canonical_keys(keys)[keys[0]] == "decoder.up.3.block.0.conv1.weight"
    assert canonical_keys(keys)[keys[3]] == "decoder.up.0.block.0.conv1.weight"


def test_diffusers_tiny_has_these_very_keys():
    model = AutoencoderTiny(num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    assert set(as_diffusers(state_of("taesd"))) == set(model.state_dict())


def test_older_attention_names():
    attention = "encoder.mid_block.attentions.0."
    older = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out", "group_norm": "norm"}
    renamed = canonical_keys([f"{attention}{name}.weight" for name in older])
    assert list(renamed.values()) == [f"encoder.mid.attn_1.{name}.weight" for name in older.values()]


def test_flux2_as_its_makers_publish_it():
    keys = ["encoder.quant_conv.weight", "decoder.post_quant_conv.bias", "bn.running_mean"]
    assert list(canonical_keys(keys).values()) == ["quant_conv.weight", "post_quant_conv.bias", "bn.running_mean"]


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_of_a_full_checkpoint_only_the_autoencoder_counts(prefix):
    keys = [
        f"{prefix}encoder.conv_in.weight",
        f"{prefix}loss.logvar",
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "model_ema.decay",
    ]
    assert canonical_keys(keys) == {keys[0]: "encoder.conv_in.weight"}


def test_training_s_leftovers_are_dropped_and_nothing_else():
    keys = ["encoder.conv_in.weight", "loss.discriminator.main.0.weight", "model_ema.decay", "surprise.weight"]
    assert list(canonical_keys(keys)) == ["encoder.conv_in.weight", "surprise.weight"]


def test_comfyui_s_taesd():
    keys = ["taesd_encoder.0.weight", "taesd_decoder.1.weight", "vae_scale", "vae_shift"]
    assert list(canonical_keys(keys).values()) == ["encoder.0.weight", "decoder.1.weight"]


def test_bare_numbers_take_the_half_from_the_name():
    assert canonical_keys(["0.weight"], "taesd_encoder") == {"0.weight": "encoder.0.weight"}
    assert canonical_keys(["1.weight"], "my_taesd_decoder") == {"1.weight": "decoder.1.weight"}
    with pytest.raises(UnsupportedCheckpoint, match="_encoder or _decoder"):
        canonical_keys(["0.weight"], "taesd")


def test_half_of():
    assert half_of("taesd_encoder") == "encoder"
    assert half_of("encoder_taesd") is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_layout_of(family, prefix):
    ours = state_of(family)
    assert layout_of([prefix + key for key in ours]) == "ldm"
    assert layout_of([prefix + key for key in as_diffusers(ours)]) == "diffusers"


def test_layout_of_other_spellings():
    assert layout_of(["taesd_encoder.0.weight", "vae_scale"]) == "ldm"
    assert layout_of(["encoder.quant_conv.weight"]) == "ldm"
    assert layout_of(["0.weight"], "x_encoder") == "ldm"
    assert layout_of(["encoder.mid_block.attentions.0.query.weight"]) == "diffusers"


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_both_layouts(family):
    ours = state_of(family)
    theirs = as_diffusers(ours)
    for name, key in diffusers_keys(ours).items():
        for shape in (tuple(ours[name].shape), tuple(theirs[key].shape)):
            assert layout_shape(name, shape, "ldm") == tuple(ours[name].shape)
            assert layout_shape(name, shape, "diffusers") == tuple(theirs[key].shape)
