"""Who decides the family, in which order, and what is left undecided."""

from dataclasses import replace

import pytest

from app.errors import UnsupportedCheckpoint
from app.store.declared import Declared
from app.store.family import CUSTOM, Hints, candidates, doubt_of, family_of
from app.vae.families import FAMILIES
from tests.store.weights import kl_config, tiny_config

SD = kl_config("sd1")
SD3 = kl_config("sd3")
UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def found(config, **hints):
    family, source = family_of(config, Hints(**hints))
    return family.name, source


def operator(**said):
    return Declared("operator", "x.json", **said)


def configured(**said):
    return Declared("config", "config.json", **said)


def test_shapes_leave_these_open():
    assert [row.name for row in candidates(SD)] == ["sd1", "sd2", "sdxl"]
    assert [row.name for row in candidates(SD3)] == ["sd3", "flux"]
    assert [row.name for row in candidates(kl_config("flux2"))] == ["flux2"]
    assert [row.name for row in candidates(tiny_config("taef2"))] == ["taef2"]
    assert [row.name for row in candidates(tiny_config("taesana"))] == ["taesana"]


def test_the_operator_comes_first():
    hints = {"pipeline": {UNET: (320, 768)}, "known_family": "sd1", "default_family": "sd1"}
    said = (operator(family="sdxl"), configured(family="sd2"))
    assert found(SD, declared=said, **hints) == ("sdxl", "operator")
    assert found(SD, declared=said[1:], **hints) == ("sd2", "config")
    assert found(SD, **hints) == ("sd1", "checkpoint")


def test_constants_of_a_config_lead_to_the_row():
    assert found(SD, declared=(configured(scaling_factor=0.13025),)) == ("sdxl", "config")
    assert found(SD, declared=(configured(scaling_factor=0.18215),)) == ("sd1", "config")
    flux = configured(scaling_factor=0.3611, shift_factor=0.1159)
    assert found(SD3, declared=(flux,)) == ("flux", "config")


def test_an_old_config_without_a_scale_is_sd1_s():
    old = configured(default_scaling_factor=0.18215)
    assert found(SD, declared=(old,)) == ("sd1", "config")
    assert found(SD3, declared=(old,), default_family="flux") == ("flux", "default")


def test_other_constants_make_a_family_of_their_own():
    family, source = family_of(SD, Hints(declared=(configured(scaling_factor=0.5, shift_factor=0.1),)))
    assert (family.name, source) == (CUSTOM, "config")
    assert (family.latent_format.scaling_factor, family.latent_format.shift_factor) == (0.5, 0.1)
    assert family.latent_channels == 4


def test_a_shift_alone_distinguishes():
    family, _ = family_of(SD3, Hints(declared=(configured(scaling_factor=1.5305),)))
    assert family.name == CUSTOM
    assert family.latent_format.shift_factor == 0.0


def test_constants_make_shapes_usable_that_no_row_has():
    config = kl_config("sd1", encoder_widths=(32, 32, 32), decoder_widths=(32, 32, 32), latent_channels=6)
    with pytest.raises(UnsupportedCheckpoint, match="no known family is kl, 6 latent channels at 1/4"):
        found(config)
    family, _ = family_of(config, Hints(declared=(configured(scaling_factor=0.08333),)))
    assert (family.spatial_factor, family.latent_channels) == (4, 6)
    assert family.latent_format.scaling_factor == 0.08333


def test_a_named_family_keeps_its_name_with_other_constants():
    family, _ = family_of(SD, Hints(declared=(operator(family="sdxl", scaling_factor=0.2),)))
    assert family.name == "sdxl"
    assert family.latent_format == replace(FAMILIES["sdxl"].latent_format, scaling_factor=0.2)


def test_a_name_that_contradicts_the_shapes():
    with pytest.raises(UnsupportedCheckpoint, match=r"x\.json says family flux .* the weights are kl, 4 latent"):
        found(SD, declared=(operator(family="flux"),))
    with pytest.raises(UnsupportedCheckpoint, match="tiny"):
        found(SD, declared=(operator(family="taesd"),))


@pytest.mark.parametrize(
    ("key", "shape", "family"),
    [
        (UNET, (320, 768), "sd1"),
        (UNET, (320, 1024), "sd2"),
        (UNET.replace("1.1", "4.1"), (640, 2048), "sdxl"),
        (UNET.replace("1.1", "4.1"), (768, 1280), "sdxl"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", (768,), "sd1"),
        ("cond_stage_model.model.ln_final.weight", (1024,), "sd2"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", (768,), "sdxl"),
    ],
)
def test_the_rest_of_a_full_checkpoint(key, shape, family):
    assert found(SD, pipeline={key: shape}) == (family, "checkpoint")


def test_sd3_and_flux_checkpoints():
    assert found(SD3, pipeline={"model.diffusion_model.joint_blocks.0.x": (1,)}) == ("sd3", "checkpoint")
    blocks = {"model.diffusion_model.double_blocks.0.x": (1,)}
    assert found(SD3, pipeline=blocks) == ("flux", "checkpoint")
    assert found(kl_config("flux2"), pipeline=blocks) == ("flux2", "checkpoint")


def test_a_pipeline_of_another_kind_says_nothing():
    assert found(SD, pipeline={"model.diffusion_model.joint_blocks.0.x": (1,)}, default_family="sd2") == (
        "sd2",
        "default",
    )


def test_the_known_table():
    assert found(SD, known_family="sdxl", default_family="sd1") == ("sdxl", "hash")
    assert found(SD3, known_family="sd3") == ("sd3", "hash")


def test_the_default():
    assert found(SD, default_family="sd1") == ("sd1", "default")
    assert found(SD3, default_family="flux") == ("flux", "default")
    assert found(SD, default_family="latentd-small") == ("latentd-small", "default")


def test_what_was_a_guess_when_it_was_written_stays_one():
    guess = Declared("default", "metadata", "sdxl")
    assert found(SD, declared=(guess,)) == ("sdxl", "default")
    assert found(SD, declared=(guess,), default_family="sd1") == ("sd1", "default")  # as if it had not been written
    assert found(SD, declared=(guess,), default_family="flux") == ("sdxl", "default")
    assert found(SD, declared=(guess,), known_family="sd2") == ("sd2", "hash")
    assert found(SD, declared=(guess, operator(family="sd2"))) == ("sd2", "operator")
    assert found(SD, declared=(guess,), pipeline={UNET: (320, 768)}) == ("sd1", "checkpoint")
    constants = Declared("default", "config.json", scaling_factor=0.18215)
    assert found(SD, declared=(constants,), default_family="sdxl") == ("sdxl", "default")


def test_a_guess_is_told_with_what_the_file_s_name_hints_at():
    sd1 = FAMILIES["sd1"]
    assert doubt_of(sd1, "config", "sdxl_vae") is None
    told = doubt_of(sd1, "default", "My-SDXL_vae")
    assert told is not None
    assert "family sd1 is a guess" in told
    assert "the file's name hints at sdxl" in told
    assert '{"family": "sdxl"} in a NAME.json' in told
    for name in ("vae", "flux-ae", "taesd"):  # these two could not be what the shapes are
        told = doubt_of(sd1, "default", name)
        assert told is not None
        assert "hints" not in told
        assert '{"family": "sd1"}' in told


def test_a_name_is_a_hint_and_decides_nothing():
    assert found(SD, stem="sdxl_vae", default_family="sd1") == ("sd1", "default")
    with pytest.raises(UnsupportedCheckpoint, match=r"the file's name hints at flux; put .*flux"):
        found(SD3, stem="flux-ae", default_family="sd1")


def test_undecided_names_the_candidates_and_the_way_out():
    with pytest.raises(UnsupportedCheckpoint, match=r"could be sd3 or flux: .*NAME\.json"):
        found(SD3, default_family="sd1")
    with pytest.raises(UnsupportedCheckpoint, match="could be sd1 or sd2 or sdxl"):
        found(SD, default_family="flux")


def test_same_constants_need_no_decision_only_a_name():
    tiny = tiny_config("taesd")
    assert found(tiny, stem="whatever") == ("taesd", "checkpoint")
    assert found(tiny, stem="TAESDXL-v2") == ("taesdxl", "checkpoint")
    assert found(tiny, stem="taesd", default_family="taesdxl") == ("taesdxl", "checkpoint")
    assert found(tiny_config("taef1"), stem="taef1") == ("taef1", "checkpoint")
    assert found(tiny, known_family="taesdxl") == ("taesdxl", "hash")
