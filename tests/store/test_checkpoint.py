"""What is loaded is what was saved, in every family, layout and file form, and hangs on no file afterwards."""

import os

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from torch import nn

from app.errors import UnsupportedCheckpoint
from app.execution.primitive import Whole
from app.store.checkpoint import CheckpointChanged, load_autoencoder, read_state, read_statistics
from app.store.store import open_checkpoint
from app.vae.families import FAMILIES
from tests.store.weights import (
    SUFFIXES,
    as_diffusers,
    as_published,
    config_of,
    kl_config,
    module_of,
    state_of,
    under,
    write,
    write_folder,
)

CPU = torch.device("cpu")
LAYOUTS = {
    "ldm": lambda state: state,
    "diffusers": as_diffusers,
    "first_stage_model": under("first_stage_model."),
    "vae": lambda state: under("vae.")(as_diffusers(state)),
}


def sidecar(path, family):
    path.with_suffix(".json").write_text(f'{{"family": "{family}"}}')


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_in_every_layout_there_and_back(tmp_path, family, layout):
    module = module_of(family)
    # the five file forms take turns, so that each meets every layout
    suffix = SUFFIXES[(list(FAMILIES).index(family) + list(LAYOUTS).index(layout)) % len(SUFFIXES)]
    path = write(tmp_path / f"x{suffix}", LAYOUTS[layout](as_published(module.state_dict())))
    sidecar(path, family)
    checkpoint = open_checkpoint(path)
    assert checkpoint.family == FAMILIES[family]
    assert checkpoint.config == config_of(family)
    assert checkpoint.parameters == sum(value.numel() for value in module.parameters())
    loaded = load_autoencoder(checkpoint, torch.float32, CPU)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, module.state_dict()[key])
    module.to(memory_format=torch.channels_last)  # the same kernels, hence the same rounding
    factor, colours = FAMILIES[family].spatial_factor, loaded.config.pixel_channels
    pixels, latents = torch.rand(1, colours, factor * 2, factor), torch.randn(1, FAMILIES[family].latent_channels, 2, 3)
    torch.testing.assert_close(loaded.encode(Whole(), pixels), module.encode(Whole(), pixels))
    torch.testing.assert_close(loaded.decode(Whole(), latents), module.decode(Whole(), latents))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_form(tmp_path, suffix):
    state = state_of()
    checkpoint = open_checkpoint(write(tmp_path / f"x{suffix}", state), "sd1")
    assert checkpoint.format == suffix[1:]
    loaded = load_autoencoder(checkpoint, torch.float32, CPU).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "weights"])
def test_a_diffusers_folder(tmp_path, name):
    state = state_of(norm_groups=8)
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": 8, "scaling_factor": 0.13025}
    checkpoint = open_checkpoint(write_folder(tmp_path / "x" / "vae", state, config, name))
    assert (checkpoint.name, checkpoint.format, checkpoint.family.name) == ("x", "diffusers", "sdxl")
    loaded = load_autoencoder(checkpoint, torch.float32, CPU)
    assert loaded.config == kl_config(norm_groups=8)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def pair(folder, state, suffix=".pth"):
    for half in ("encoder", "decoder"):
        bare = {key.removeprefix(f"{half}."): value for key, value in state.items() if key.startswith(half)}
        write(folder / f"tiny_{half}{suffix}", bare)
    return folder / f"tiny_encoder{suffix}"


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.architecture == "tiny"])
def test_a_pair_of_halves(tmp_path, family):
    state = state_of(family)
    checkpoint = open_checkpoint(pair(tmp_path, state))
    assert [file.name for file in checkpoint.files] == ["tiny_encoder.pth", "tiny_decoder.pth"]
    assert checkpoint.family.latent_channels == FAMILIES[family].latent_channels
    loaded = load_autoencoder(checkpoint, torch.float32, CPU).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_the_device_wants_it(tmp_path, dtype):
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", state_of("flux2")))
    module = load_autoencoder(checkpoint, dtype, CPU)
    assert not module.training
    assert not any(value.requires_grad for value in module.parameters())
    for value in module.parameters():
        assert value.dtype == dtype
        assert value.device == CPU
        assert value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last)
    assert module.bn is not None
    assert module.bn.running_mean is not None
    assert module.bn.running_mean.dtype == torch.float32
    held = sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
    assert checkpoint.weight_bytes(dtype) == held


def test_statistics_without_their_counter(tmp_path):
    state = state_of("flux2")
    del state["bn.num_batches_tracked"]
    module = load_autoencoder(open_checkpoint(write(tmp_path / "x.pt", state)), torch.float16, CPU)
    assert isinstance(module.bn, nn.BatchNorm2d)
    assert module.bn.num_batches_tracked is not None
    assert module.bn.num_batches_tracked.item() == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_written_over_in_place_does_not_reach_a_loaded_module(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", state_of())
    module = load_autoencoder(open_checkpoint(path, "sd1"), torch.float32, CPU)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    os.truncate(path, 0)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_changed_file_is_not_loaded(tmp_path):
    path = write(tmp_path / "x.safetensors", state_of())
    checkpoint = open_checkpoint(path, "sd1")
    assert not checkpoint.changed()
    write(path, state_of(seed=1))
    assert checkpoint.changed()
    with pytest.raises(CheckpointChanged, match=r"x: x\.safetensors has changed"):
        load_autoencoder(checkpoint, torch.float32, CPU)
    path.unlink()
    with pytest.raises(CheckpointChanged):
        load_autoencoder(checkpoint, torch.float32, CPU)


def test_a_replaced_config_is_a_change_too(tmp_path):
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215}
    folder = write_folder(tmp_path / "x", state_of(), config)
    checkpoint = open_checkpoint(folder)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}')
    assert checkpoint.changed()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", state_of())
    reading = read_state(open_checkpoint(path, "sd1"))
    if suffix == ".safetensors":
        os.truncate(path, 1000)
        with pytest.raises(UnsupportedCheckpoint, match="truncated"):
            list(reading)
    else:
        next(reading)
        path.unlink()  # a mapping outlives the name
        assert len(list(reading)) == len(state_of()) - 1


def test_fp8_weights_are_widened(tmp_path):
    state = {key: value.to(torch.float8_e4m3fn) for key, value in state_of().items()}
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", state), "sd1")
    module = load_autoencoder(checkpoint, torch.float16, CPU)
    assert torch.equal(module.state_dict()["decoder.conv_in.weight"], state["decoder.conv_in.weight"].half())


@pytest.fixture(scope="module")
def sd_sized(tmp_path_factory):
    """diffusers' random VAE of SD's own size; and its checkpoint and module, by way of a file."""
    torch.manual_seed(0)
    blocks = 4
    reference = Reference(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
    ).eval()
    path = write(tmp_path_factory.mktemp("sd") / "x.safetensors", reference.state_dict())
    checkpoint = open_checkpoint(path, "sd1")
    module = load_autoencoder(checkpoint, torch.float32, CPU)
    path.unlink()
    return reference, checkpoint, module


@pytest.mark.slow
@torch.inference_mode()
def test_a_vae_of_sd_s_own_size_gives_diffusers_latents(sd_sized):
    """To fp16 rounding: what leaves the service as float16 differs by one step at most."""
    reference, checkpoint, module = sd_sized
    assert checkpoint.parameters == 83_653_863
    assert checkpoint.family.name == "sd1"
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = reference.encode(pixels).latent_dist.mode() * 0.18215
    scaled = checkpoint.family.latent_format.scale(module.posterior(module.encode(Whole(), pixels)).mode())
    step = torch.finfo(torch.float16).eps * expected.abs().max().item()
    torch.testing.assert_close(scaled.half(), expected.half(), atol=step, rtol=torch.finfo(torch.float16).eps)
    decoded = module.decode(Whole(), checkpoint.family.latent_format.unscale(scaled))
    torch.testing.assert_close(decoded, reference.decode(expected / 0.18215).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", [*SUFFIXES, "diffusers"])
def test_every_form_of_it_is_that_very_module(tmp_path, sd_sized, form):
    reference, first, expected = sd_sized
    if form == "diffusers":
        reference.save_pretrained(tmp_path / "x")
        path = tmp_path / "x"
    else:
        path = write(tmp_path / f"x{form}", reference.state_dict())
    checkpoint = open_checkpoint(path, "sd1")
    assert (checkpoint.config, checkpoint.family) == (first.config, first.family)
    found, wanted = load_autoencoder(checkpoint, torch.float32, CPU).state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert checkpoint.tensors_sha256 == first.tensors_sha256


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_statistics_of_the_latents_are_read_alone(tmp_path, layout):
    module = module_of("flux2")
    model = open_checkpoint(write(tmp_path / "vae.safetensors", LAYOUTS[layout](module.state_dict())))
    found = read_statistics(model)
    assert found is not None
    assert module.bn is not None
    assert (found.eps, found.patch) == (module.bn.eps, 2)
    torch.testing.assert_close(torch.tensor(found.mean), module.bn.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(torch.tensor(found.variance), module.bn.running_var, rtol=0, atol=0)


def test_weights_without_statistics_have_none(tmp_path):
    path = write(tmp_path / "vae.safetensors", state_of("flux"))
    sidecar(path, "flux")
    assert read_statistics(open_checkpoint(path)) is None


def test_statistics_that_are_not_finite_are_refused(tmp_path):
    state = state_of("flux2")
    state["bn.running_var"][3] = torch.nan
    model = open_checkpoint(write(tmp_path / "vae.safetensors", state))
    with pytest.raises(UnsupportedCheckpoint, match="not finite"):
        read_statistics(model)


def test_statistics_of_a_file_that_was_replaced_are_not_read(tmp_path):
    path = write(tmp_path / "vae.safetensors", state_of("flux2"))
    model = open_checkpoint(path)
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointChanged):
        read_statistics(model)
