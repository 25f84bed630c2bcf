"""Parity with diffusers on random weights: every family, encode and decode, several sizes, batch 2."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from diffusers import AutoencoderKLFlux2 as ReferenceFlux2
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.execution.primitive import Whole
from app.vae.autoencoder_kl import AutoencoderKL, KLConfig
from app.vae.families import FAMILIES
from app.vae.layout_kl import ldm_keys

GROUPS = 4
WIDTHS = (8, 16, 16, 32)
TOLERANCE = 1e-4  # of the output's range, in float32
KL_ROWS = [row for row in FAMILIES.values() if row.architecture == "kl"]
NO_QUANT = {"sd3", "flux"}
SIZES = [(1, 64, 64), (2, 40, 56), (1, 43, 61)]  # batch, height, width: the last is no multiple of 8


def reference(family: str = "sd1", **changes: Any) -> Any:
    """A random diffusers VAE of a family's kind: small, but with every layer that the family has."""
    torch.manual_seed(0)
    quant = family not in NO_QUANT
    options: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "latent_channels": FAMILIES[family].latent_channels,
        "norm_num_groups": GROUPS,
        "layers_per_block": 1,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }
    if family == "flux2":
        options["decoder_block_out_channels"] = (8, 8, 16, 24)
        model = ReferenceFlux2(**(options | changes))
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.1, 2.0)
    else:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        model = Reference(**(blocks | options | changes))
    return model.eval()


def ours(model: Any) -> AutoencoderKL:
    """Our network with another's weights, through the rename table and the strict load."""
    state = model.state_dict()
    names = ldm_keys(state)
    state = {names[key]: value for key, value in state.items()}
    config = KLConfig.from_shapes({key: tuple(value.shape) for key, value in state.items()}, GROUPS)
    vae = AutoencoderKL(config).eval()
    wanted = vae.state_dict()
    vae.load_state_dict({key: value.reshape(wanted[key].shape) for key, value in state.items()}, strict=True)
    return vae


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    span = (expected.max() - expected.min()).item()
    assert span > 0.01
    assert (got - expected).abs().max().item() <= TOLERANCE * span


@pytest.mark.parametrize("row", KL_ROWS, ids=lambda row: row.name)
@torch.inference_mode()
def test_encode_is_diffusers(row):
    model = reference(row.name)
    vae = ours(model)
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        expected = model.encode(pixels).latent_dist
        moments = vae.encode(Whole(), pixels)
        assert_same(moments, expected.parameters)
        assert_same(vae.posterior(moments).mode(), expected.mode())


@pytest.mark.parametrize("row", KL_ROWS, ids=lambda row: row.name)
@torch.inference_mode()
def test_decode_is_diffusers(row):
    model = reference(row.name)
    vae = ours(model)
    for batch, height, width in [(1, 8, 8), (2, 5, 7), (1, 1, 9)]:
        latents = torch.randn(batch, row.latent_channels, height, width)
        assert_same(vae.decode(Whole(), latents), model.decode(latents).sample)


@torch.inference_mode()
def test_flux2_scaled_latents_are_the_pipeline_s():
    model = reference("flux2")
    vae, form = ours(model), FAMILIES["flux2"].latent_format
    pixels = torch.randn(2, 3, 32, 48)
    raw = model.encode(pixels).latent_dist.mode()  # (2, 32, 4, 6)
    packed = raw.view(2, 32, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 128, 2, 3)
    std = (model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps).sqrt()
    expected = (packed - model.bn.running_mean.view(1, -1, 1, 1)) / std
    scaled = form.scale(vae.posterior(vae.encode(Whole(), pixels)).mode(), vae.bn)
    assert_same(scaled, expected)
    assert_same(vae.decode(Whole(), form.unscale(scaled, vae.bn)), model.decode(raw).sample)


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"layers_per_block": 2},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"block_out_channels": (8, 8, 16, 16)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_variants(changes):
    model = reference("sd1", **changes)
    vae = ours(model)
    pixels, latents = torch.randn(1, 3, 32, 40), torch.randn(1, 4, 4, 5)
    assert_same(vae.encode(Whole(), pixels), model.encode(pixels).latent_dist.parameters)
    assert_same(vae.decode(Whole(), latents), model.decode(latents).sample)


@torch.inference_mode()
def test_two_levels_make_a_factor_of_two():
    model = reference(
        "sd1",
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    vae = ours(model)
    assert vae.config.spatial_factor == 2
    latents = torch.randn(1, 4, 6, 6)
    assert_same(vae.decode(Whole(), latents), model.decode(latents).sample)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in ours(model).state_dict().items()}


def test_the_shapes_say_the_configuration():
    config = KLConfig.from_shapes(shapes_of(reference("flux2", layers_per_block=2)), GROUPS)
    assert config.encoder_widths == WIDTHS
    assert config.decoder_widths == (8, 8, 16, 24)
    assert (config.encoder_depth, config.decoder_depth) == (2, 3)
    assert (config.latent_channels, config.spatial_factor, config.norm_groups) == (32, 8, GROUPS)
    assert config.batch_norm
    assert config.mid_attention


def test_a_missing_half_is_named():
    shapes = {key: shape for key, shape in shapes_of(reference()).items() if not key.startswith("encoder.")}
    with pytest.raises(UnsupportedCheckpoint, match=r"encoder\.down\.0\.block\.0\.conv2\.weight"):
        KLConfig.from_shapes(shapes, GROUPS)


def test_a_group_count_that_does_not_divide_is_named():
    with pytest.raises(UnsupportedCheckpoint, match="norm_num_groups"):
        KLConfig.from_shapes(shapes_of(reference()), 32)


def test_halves_of_different_depth_are_refused():
    shapes = {key: shape for key, shape in shapes_of(reference()).items() if not key.startswith("decoder.up.3")}
    with pytest.raises(UnsupportedCheckpoint, match="4 levels, decoder 3"):
        KLConfig.from_shapes(shapes, GROUPS)


@pytest.mark.parametrize("shape", [(), (3,), (8, 0, 3, 3)], ids=str)
def test_a_shape_that_is_no_convolution_is_refused(shape):
    shapes = shapes_of(reference()) | {"encoder.down.1.block.0.conv2.weight": shape}
    with pytest.raises(UnsupportedCheckpoint, match="four sides"):
        KLConfig.from_shapes(shapes, GROUPS)
