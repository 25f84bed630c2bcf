"""What is inside of a weight file: prefixes, halves, what is dropped; and which layout it has."""

import pytest

from app.errors import UnsupportedCheckpoint
from app.vae.architectures import ARCHITECTURES
from app.vae.families import FAMILIES
from app.weights.renames import canonical_keys, half_of, inner_keys, inner_shapes, layout_of
from tests.store.weights import as_diffusers, state_of

KL, TINY = ARCHITECTURES["kl"], ARCHITECTURES["tiny"]


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_of_a_full_checkpoint_only_the_autoencoder_counts(prefix):
    keys = [
        f"{prefix}encoder.conv_in.weight",
        f"{prefix}loss.logvar",
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "model_ema.decay",
    ]
    assert inner_keys(keys) == {keys[0]: "encoder.conv_in.weight"}
    down = f"{prefix}encoder.down_blocks.0.resnets.0.norm1.bias"
    assert canonical_keys([down], KL) == {down: "encoder.down.0.block.0.norm1.bias"}


def test_a_module_saved_with_what_holds_it_is_unwrapped_and_a_unet_is_not():
    assert inner_keys(["model.encoder.conv1.weight", "model.conv2.weight"]) == {
        "model.encoder.conv1.weight": "encoder.conv1.weight",
        "model.conv2.weight": "conv2.weight",
    }
    for keys in (["model.diffusion_model.out.2.weight"], ["model.encoder.conv1.weight", "surprise.weight"]):
        assert inner_keys(keys) == {key: key for key in keys}


def test_training_s_leftovers_are_dropped_and_nothing_else():
    keys = ["encoder.conv_in.weight", "loss.discriminator.main.0.weight", "model_ema.decay", "surprise.weight"]
    assert list(inner_keys(keys)) == ["encoder.conv_in.weight", "surprise.weight"]


def test_comfyui_s_taesd():
    keys = ["taesd_encoder.0.weight", "taesd_decoder.1.weight", "vae_scale", "vae_shift"]
    assert list(canonical_keys(keys, TINY).values()) == ["encoder.0.weight", "decoder.1.weight"]


def test_bare_numbers_take_the_half_from_the_name():
    assert inner_keys(["0.weight"], "taesd_encoder") == {"0.weight": "encoder.0.weight"}
    assert canonical_keys(["1.weight"], TINY, "my_taesd_decoder") == {"1.weight": "decoder.1.weight"}
    with pytest.raises(UnsupportedCheckpoint, match="_encoder or _decoder"):
        inner_keys(["0.weight"], "taesd")


def test_a_pair_of_files_is_one_autoencoder():
    pair = [({"0.weight": (4, 3, 3, 3)}, "x_encoder"), ({"1.weight": (4, 4, 3, 3)}, "x_decoder")]
    assert inner_shapes(pair) == {"encoder.0.weight": (4, 3, 3, 3), "decoder.1.weight": (4, 4, 3, 3)}


def test_half_of():
    assert half_of("taesd_encoder") == "encoder"
    assert half_of("encoder_taesd") is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_layout_of(family, prefix):
    ours, row = state_of(family), ARCHITECTURES[FAMILIES[family].architecture]
    assert layout_of([prefix + key for key in ours], row) == "ldm"
    assert layout_of([prefix + key for key in as_diffusers(ours)], row) == "diffusers"


def test_layout_of_other_spellings():
    assert layout_of(["taesd_encoder.0.weight", "vae_scale"], TINY) == "ldm"
    assert layout_of(["encoder.quant_conv.weight"], KL) == "ldm"
    assert layout_of(["0.weight"], TINY, "x_encoder") == "ldm"
    assert layout_of(["encoder.mid_block.attentions.0.query.weight"], KL) == "diffusers"
