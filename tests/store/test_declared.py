"""What sidecars, diffusers configs and metadata may say, and what they are told when they say something else."""

import json

import pytest

from app.errors import UnsupportedCheckpoint
from app.store.declared import Declared, from_config, from_metadata, from_sidecar, norm_groups


def test_a_sidecar(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"family": "sdxl", "norm_num_groups": 16, "scaling_factor": 0.5, "shift_factor": 1}')
    assert from_sidecar(path) == Declared("operator", "x.json", "sdxl", 16, 0.5, 1.0)


def test_another_program_s_json_is_none_of_ours(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"description": "my favourite", "sd version": "SDXL"}')
    assert from_sidecar(path) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"family": "sd9"}', "unknown family 'sd9'; expected one of sd1, sd2"),
        ('{"family": ["sd1"]}', "unknown family"),
        ('{"family": "sdxl", "colour": 1}', "unknown key 'colour'; expected family, norm_num_groups"),
        ('{"norm_num_groups": 0}', "norm_num_groups is 0"),
        ('{"norm_num_groups": true}', "norm_num_groups is True"),
        ('{"norm_num_groups": 8.5}', "norm_num_groups is 8.5"),
        ('{"scaling_factor": 0}', "scaling_factor is 0"),
        ('{"scaling_factor": 1e-300}', "scaling_factor is 1e-300; expected at least 1e-06"),
        ('{"scaling_factor": "big"}', "scaling_factor is 'big'"),
        ('{"scaling_factor": NaN}', "scaling_factor is nan"),
        ('{"scaling_factor": 1e400}', "scaling_factor is inf"),
        ('{"shift_factor": 0.1}', "needs a scaling_factor or a family"),
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"a":' * 100_000, "no JSON"),
        (" " * (1 << 21), "larger than"),
    ],
    ids=range(16),
)
def test_a_sidecar_that_is_not_understood(tmp_path, text, reason):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UnsupportedCheckpoint, match=r"x\.json") as caught:
        from_sidecar(path)
    assert reason in str(caught.value)


def config(tmp_path, **content):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "AutoencoderKL"} | content))
    return from_config(path)


def test_a_diffusers_config(tmp_path):
    said = config(tmp_path, scaling_factor=1.5305, shift_factor=0.0609, norm_num_groups=8, latent_channels=16)
    assert (said.source, said.scaling_factor, said.shift_factor, said.norm_num_groups) == ("config", 1.5305, 0.0609, 8)


@pytest.mark.parametrize(("written", "family"), [("sd2", "sd2"), ("sd9", None), (None, None), (3, None)])
def test_our_family_in_a_diffusers_config(tmp_path, written, family):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "AutoencoderKL", "_family": written}))
    assert from_config(path).family == family


def test_an_old_config_means_diffusers_default(tmp_path):
    said = config(tmp_path)
    assert (said.scaling_factor, said.default_scaling_factor) == (None, 0.18215)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"_class_name": "AutoencoderNobody"}, "_class_name is AutoencoderNobody; expected one of "),
        ({"_class_name": "AutoencoderDC", "decoder_conv_act_fn": "silu"}, "decoder_conv_act_fn is silu; expected relu"),
        (
            {"_class_name": "AutoencoderDC", "decoder_norm_types": ["batch_norm", "rms_norm"]},
            "decoder_norm_types is .*; expected rms_norm",
        ),
        (
            {"_class_name": "AutoencoderKLHunyuanImage", "upsample_match_channel": False},
            "upsample_match_channel is False",
        ),
        ({"act_fn": "gelu"}, "act_fn is gelu; expected silu"),
        ({"latents_mean": [0.0]}, "latents_mean and latents_std are lists of one length"),
        ({"latents_mean": [0.0], "latents_std": [1.0, 1.0]}, "lists of one length"),
        ({"latents_mean": [0.0], "latents_std": [0.0]}, "expected at least 1e-06"),
        ({"latents_mean": [0.0], "latents_std": [float("nan")]}, "expected a number, or one for each channel"),
        ({"latents_mean": [0.0, "1"], "latents_std": [1.0, 1.0]}, "latents_mean is .*; expected a number"),
        ({"latents_mean": [0.0] * 5000, "latents_std": [1.0] * 5000}, "expected a number, or one for each channel"),
        ({"scaling_factor": "0.1"}, "expected a number"),
    ],
)
def test_a_config_of_another_kind_of_network(tmp_path, content, reason):
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        config(tmp_path, **content)


def test_a_config_of_numbers_per_channel(tmp_path):
    said = config(tmp_path, _class_name="AutoencoderKLWan", latents_mean=[0.5, -1], latents_std=[2, 4.0])
    assert (said.scaling_factor, said.shift_factor) == ((0.5, 0.25), (0.5, -1.0))


def test_metadata_of_numbers_per_channel():
    said = from_metadata({"scaling_factor": "[0.5, 0.25]", "shift_factor": "[1, 2]"})
    assert (said.scaling_factor, said.shift_factor) == ((0.5, 0.25), (1.0, 2.0))
    with pytest.raises(UnsupportedCheckpoint, match="expected a number"):
        from_metadata({"family": "sd1", "scaling_factor": "[" * 100_000})


def test_metadata():
    said = from_metadata({"family": "latentd-small", "norm_num_groups": "8", "scaling_factor": "0.5", "format": "pt"})
    assert said == Declared("config", "metadata", "latentd-small", 8, 0.5)


def test_a_guess_that_was_written_down_is_read_as_one(tmp_path):
    said = from_metadata({"family": "sd1", "family_source": "default"})
    assert said == Declared("default", "metadata", "sd1")
    assert from_metadata({"family": "sd1", "family_source": "operator"}).source == "config"
    content = {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215, "_family_source": "default"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert from_config(tmp_path / "config.json").source == "default"


def test_metadata_of_other_programs_is_ignored():
    assert from_metadata({"family": "portraits", "norm_num_groups": "many"}) == Declared("config", "metadata")


def test_metadata_may_give_the_group_count_alone():
    assert from_metadata({"norm_num_groups": "8"}) == Declared("config", "metadata", norm_num_groups=8)


def test_metadata_of_ours_must_be_sound():
    with pytest.raises(UnsupportedCheckpoint, match="norm_num_groups is 'many'"):
        from_metadata({"family": "sd1", "norm_num_groups": "many"})


def test_the_first_group_count_wins():
    silent, eight, four = Declared("operator", "a"), Declared("config", "b", None, 8), Declared("config", "c", None, 4)
    assert norm_groups([silent, eight, four]) == 8
    assert norm_groups([silent]) is None


def test_a_class_s_name_in_an_error_is_plain_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"_class_name": "Autoencoder\\ud800"}')
    with pytest.raises(UnsupportedCheckpoint, match=r"_class_name is Autoencoder.ud800; expected"):
        from_config(path)
