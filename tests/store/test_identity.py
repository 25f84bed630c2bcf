"""A file is accepted only when the strict load is sure to succeed, and its refusal says what is wrong."""

import json

import pytest
import torch

from app.errors import UnsupportedCheckpoint
from app.store import identity as describe
from app.store.known import Known
from app.store.store import open_checkpoint
from tests.store.weights import as_diffusers, kl_config, sparse, state_of, under, write, write_folder

UNET = "model.diffusion_model."
ATTENTION = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


def refusal(path):
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_checkpoint(path, "sd1")
    return str(caught.value)


def test_what_a_checkpoint_says(tmp_path):
    path = write(tmp_path / "x.safetensors", {key: value.half() for key, value in state_of().items()})
    checkpoint = open_checkpoint(path, "sd1")
    assert (checkpoint.name, checkpoint.path, checkpoint.files) == ("x", path, (path,))
    assert (checkpoint.family.name, checkpoint.family_source) == ("sd1", "default")
    assert (checkpoint.format, checkpoint.weight_dtype, checkpoint.fp16) == ("safetensors", "fp16", "unknown")
    assert checkpoint.known_as is None
    assert not checkpoint.baked


def test_an_unknown_key_is_an_error(tmp_path):
    state = state_of() | {f"surprise.{index}": torch.zeros(1) for index in range(5)}
    assert refusal(write(tmp_path / "x.pt", state)) == "left over surprise.0, surprise.1, surprise.2 and 2 more"


def test_a_missing_key_is_an_error(tmp_path):
    state = state_of()
    del state["decoder.mid.block_2.norm1.bias"]
    assert refusal(write(tmp_path / "x.pt", state)) == "missing decoder.mid.block_2.norm1.bias"


def test_a_shape_that_does_not_fit_is_an_error(tmp_path):
    state = state_of() | {"decoder.conv_out.weight": torch.zeros(4, 32, 3, 3)}
    assert "decoder.conv_out.weight has shape (4, 32, 3, 3); expected (3, 32, 3, 3)" in refusal(
        write(tmp_path / "x.pt", state)
    )


def test_integer_weights_are_an_error(tmp_path):
    state = state_of() | {"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int8)}
    assert refusal(write(tmp_path / "x.pt", state)) == "decoder.conv_out.bias is int8; expected floating point"


def test_training_s_leftovers_are_no_error(tmp_path):
    state = state_of() | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    assert not open_checkpoint(write(tmp_path / "x.ckpt", state), "sd1").baked


def test_a_full_checkpoint(tmp_path):
    state = under("first_stage_model.")(state_of()) | {ATTENTION: torch.zeros(640, 2048), "betas": torch.zeros(3)}
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", state), "sd1")
    assert checkpoint.baked
    assert (checkpoint.family.name, checkpoint.family_source) == ("sdxl", "checkpoint")
    assert checkpoint.parameters == sum(value.numel() for value in state_of().values())


@pytest.mark.parametrize("key", [ATTENTION, "down_blocks.0.resnets.0.conv1.weight", "lora_unet_x.alpha"])
def test_no_vae_inside(tmp_path, key):
    assert "no VAE inside" in refusal(write(tmp_path / "x.safetensors", {key: torch.zeros(4, 4)}))


def test_a_text_encoder_is_no_vae(tmp_path):
    assert "only the encoder" in refusal(write(tmp_path / "x.pt", {"encoder.block.0.layer.0.weight": torch.zeros(4)}))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_tiny_autoencoder(tmp_path, half):
    other = {"encoder": "decoder", "decoder": "encoder"}[half]
    state = {key.removeprefix(f"{half}."): value for key, value in state_of("taesd").items() if key.startswith(half)}
    path = write(tmp_path / f"x_{half}.pth", state)
    assert refusal(path) == f"only the {half}: x_{other}.* is missing beside it"


def test_both_halves_in_a_file_named_like_a_half(tmp_path):
    path = write(
        tmp_path / "full_encoder_small_decoder.safetensors", state_of("flux2", decoder_widths=(32, 32, 64, 64))
    )
    checkpoint = open_checkpoint(path)
    assert (checkpoint.name, checkpoint.family.name) == ("full_encoder_small_decoder", "flux2")


def test_two_whole_models_are_no_pair(tmp_path):
    for half in ("encoder", "decoder"):
        path = write(tmp_path / f"x_{half}.pt", state_of("taesd"))
    assert "is there twice" in refusal(path)


def test_our_own_metadata(tmp_path):
    metadata = {"family": "latentd-small", "norm_num_groups": "8"}
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", state_of(norm_groups=8), metadata), "sdxl")
    assert (checkpoint.family.name, checkpoint.family_source) == ("latentd-small", "config")
    assert checkpoint.config == kl_config(norm_groups=8)


def test_a_sidecar_goes_before_metadata(tmp_path):
    path = write(tmp_path / "x.safetensors", state_of(), {"family": "latentd-small", "norm_num_groups": "8"})
    (tmp_path / "x.json").write_text('{"family": "sdxl", "norm_num_groups": 16}')
    checkpoint = open_checkpoint(path)
    assert (checkpoint.family.name, checkpoint.family_source) == ("sdxl", "operator")
    assert checkpoint.config == kl_config(norm_groups=16)


def test_groups_alone_leave_the_family_to_others(tmp_path):
    path = write(tmp_path / "x.pt", state_of())
    (tmp_path / "x.json").write_text('{"norm_num_groups": 4}')
    checkpoint = open_checkpoint(path, "sd2")
    assert (checkpoint.family.name, checkpoint.family_source) == ("sd2", "default")
    assert checkpoint.config == kl_config(norm_groups=4)


def test_a_folder_without_weights_and_one_with_shards(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "without weights: expected diffusion_pytorch_model.safetensors" in refusal(tmp_path)
    for shard in ("00001-of-00002", "00002-of-00002"):
        (tmp_path / f"diffusion_pytorch_model-{shard}.safetensors").touch()
    assert "split over several files" in refusal(tmp_path)


def test_a_folder_that_is_none_of_diffusers(tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors", as_diffusers(state_of()))
    assert "config.json" in refusal(tmp_path)


def test_flux2_s_class_name_decides(tmp_path):
    folder = write_folder(tmp_path / "x", state_of("flux2"), {"_class_name": "AutoencoderKLFlux2"})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.family.name, checkpoint.family_source) == ("flux2", "config")


def test_a_known_file(tmp_path, monkeypatch):
    path = write(tmp_path / "x.safetensors", state_of())
    row = Known("a famous one", open_checkpoint(path, "sd1").sha256, "sdxl", "overflows")
    monkeypatch.setattr("app.store.known.known_files", lambda: {row.sha256: row})
    checkpoint = open_checkpoint(path, "sd1")
    assert (checkpoint.family.name, checkpoint.family_source) == ("sdxl", "hash")
    assert (checkpoint.known_as, checkpoint.fp16) == ("a famous one", "overflows")


def test_nothing_at_the_path(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing.pt")


SDXL = {ATTENTION: torch.zeros(640, 2048)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_vae_beside_a_checkpoint_of_its_name_is_of_its_family(tmp_path, suffix):
    write(tmp_path / "foo.safetensors", under("first_stage_model.")(state_of(seed=1)) | SDXL)
    checkpoint = open_checkpoint(write(tmp_path / f"foo.vae{suffix}", state_of()), "sd1")
    assert (checkpoint.name, checkpoint.family.name, checkpoint.family_source) == ("foo.vae", "sdxl", "checkpoint")
    assert not checkpoint.baked


def test_a_checkpoint_beside_that_has_no_vae_of_its_own_tells_the_family_too(tmp_path):
    write(tmp_path / "foo.safetensors", SDXL)
    assert open_checkpoint(write(tmp_path / "foo.vae.pt", state_of()), "sd1").family.name == "sdxl"


def test_a_checkpoint_beside_that_cannot_be_read_or_does_not_fit_says_nothing(tmp_path):
    path = write(tmp_path / "foo.vae.pt", state_of())
    (tmp_path / "foo.safetensors").write_text("torn")
    assert open_checkpoint(path, "sd1").family_source == "default"
    write(tmp_path / "foo.safetensors", {"model.diffusion_model.joint_blocks.0.x": torch.zeros(3)})
    assert open_checkpoint(path, "sd1").family_source == "default"


def test_what_a_vae_says_itself_goes_before_the_checkpoint_beside_it(tmp_path, monkeypatch):
    write(tmp_path / "foo.safetensors", SDXL)
    path = write(tmp_path / "foo.vae.safetensors", state_of(), {"family": "sd2"})
    assert (open_checkpoint(path, "sd1").family.name, open_checkpoint(path, "sd1").family_source) == ("sd2", "config")
    path = write(tmp_path / "foo.vae.safetensors", state_of())
    row = Known("a famous one", open_checkpoint(path, "sd1").sha256, "sd1", "ok")
    monkeypatch.setattr("app.store.known.known_files", lambda: {row.sha256: row})
    assert (open_checkpoint(path, "sdxl").family.name, open_checkpoint(path, "sdxl").family_source) == ("sd1", "hash")


def test_what_has_the_place_of_a_tensor_is_named(tmp_path):
    state = state_of("sd1")
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].to_sparse()
    with pytest.raises(UnsupportedCheckpoint, match=r"decoder\.conv_in\.weight is a sparse tensor.*dense"):
        open_checkpoint(write(tmp_path / "x.ckpt", state), "sd1")


def test_what_lies_beside_the_weights_is_no_obstacle(tmp_path):
    path = tmp_path / "x.ckpt"
    beside = {"epoch": 3, "0": [1, 2], "vae_note": "text", "3.weight": None}
    torch.save({**state_of("sd1"), **beside}, path)
    assert open_checkpoint(path, "sd1").family.name == "sd1"


def test_levels_times_blocks_make_no_network_larger_than_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "blank", lambda _: pytest.fail("built"))
    halves = ("encoder.down", "decoder.up")
    shapes = {f"{half}.{n}.block.0.conv2.weight": [1] * 4 for half in halves for n in range(500)}
    shapes |= {f"{half}.0.block.{n}.conv2.weight": [1] * 4 for half in halves for n in range(500)}
    path = sparse(tmp_path / "x.safetensors", shapes | {"decoder.conv_in.weight": [1] * 4}, {"norm_num_groups": "1"})
    assert refusal(path) == "missing tensors: 500000 residual blocks, but only 1999 tensors"


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({f"encoder.{n}.weight": [1] for n in range(4097)}, "4098 tensors; an autoencoder has at most 4096"),
        ({"encoder.conv_in.weight": [1 << 15, 1 << 14]}, "encoder.conv_in.weight of shape (32768, 16384) is too large"),
        ({"encoder.conv_in.weight": [1 << 21, 0]}, "encoder.conv_in.weight of shape (2097152, 0) is too large"),
    ],
    ids=["tensors", "values", "channels"],
)
def test_networks_beyond_measure_are_refused(tmp_path, shapes, reason, monkeypatch):
    monkeypatch.setattr(describe, "blank", lambda _: pytest.fail("built"))
    assert reason in refusal(sparse(tmp_path / "x.safetensors", shapes | {"decoder.1.weight": [1]}))


@pytest.mark.parametrize(
    "key", ["encoder.{}.weight", "decoder.layers.{}.weight", "decoder.up_blocks.{}.x", "{}.weight"]
)
def test_the_number_of_a_layer_has_an_end(tmp_path, key):
    path = sparse(tmp_path / "x_encoder.safetensors", {key.format("1" * 5000): [1], "decoder.1.weight": [1]})
    assert "is no key of an autoencoder: its number is too long" in refusal(path)


def test_somebody_s_word_goes_over_all_that_the_files_say(tmp_path):
    path = write(tmp_path / "a.safetensors", state_of(), {"family": "sd2"})
    (tmp_path / "a.json").write_text('{"family": "sd1"}')
    checkpoint = open_checkpoint(path, "sd1", "sdxl")
    assert (checkpoint.family.name, checkpoint.family_source) == ("sdxl", "operator")
    with pytest.raises(UnsupportedCheckpoint, match="--family says family flux"):
        open_checkpoint(path, "sd1", "flux")


@pytest.mark.parametrize("key", ["conv1.weight", "conv2.weight"])
def test_a_layer_of_zeros_is_refused_where_a_file_was_published_so(tmp_path, key):
    state = state_of("wan21")
    state[key] = torch.zeros_like(state[key])
    assert refusal(write(tmp_path / "x.safetensors", state)).startswith(f"{key} is all zero")


def test_constants_per_channel_are_as_many_as_the_channels(tmp_path):
    write(tmp_path / "x.safetensors", state_of("wan21"))
    config = {"_class_name": "AutoencoderKLWan", "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    folder = write_folder(tmp_path / "x", state_of("wan21"), config)
    family = open_checkpoint(folder).family
    assert family.name == "custom"
    assert (family.latent_format.scaling_factor, family.latent_format.shift_factor) == ((0.5,) * 16, (0.5,) * 16)
    config |= {"latents_mean": [0.5], "latents_std": [2.0]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "scaling_factor has 1 numbers; latents of these weights have 16 channels" in refusal(folder)
