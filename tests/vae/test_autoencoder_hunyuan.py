"""Parity with diffusers on random weights: encode and decode, several sizes, batch 2, in every execution."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanImage as Reference

from app.errors import UnsupportedCheckpoint
from app.execution.banded import Banded, gather
from app.execution.primitive import Whole
from app.vae.autoencoder_hunyuan import AutoencoderHunyuan, HunyuanConfig
from app.vae.layout_hunyuan import diffusers_config, diffusers_keys, published_keys, told
from tests.vae.test_autoencoder_dc import EXECUTIONS, SIZES, assert_same

WIDTHS = [(32, 32, 64), (32, 64, 32), (64, 64, 64)]


def reference(widths: tuple[int, ...] = WIDTHS[0]) -> Any:
    """A random VAE of HunyuanImage in diffusers, small."""
    torch.manual_seed(0)
    model = Reference(3, 3, 8, widths, 1, spatial_compression_ratio=4, sample_size=64).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def ours(model: Any) -> AutoencoderHunyuan:
    """Our network with another's weights, through the rename table and the strict load."""
    state = model.state_dict()
    names = published_keys(state)
    vae = AutoencoderHunyuan(
        HunyuanConfig.from_shapes({names[key]: tuple(value.shape) for key, value in state.items()})
    )
    vae.load_state_dict({names[key]: value for key, value in state.items()}, strict=True)
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@torch.inference_mode()
def test_is_diffusers(widths, execution):
    model = reference(widths)
    vae = ours(model)
    for batch, h, w in SIZES:
        z, pixels = torch.randn(batch, 8, h, w), torch.randn(batch, 3, 4 * h, 4 * w)
        assert_same(gather(execution, vae.decode, z), model.decode(z).sample)
        moments, expected = gather(execution, vae.encode, pixels), model.encode(pixels).latent_dist
        assert_same(moments, expected.parameters)
        assert_same(vae.posterior(moments).mode(), expected.mode())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
@torch.inference_mode()
def test_half_precision_is_near(dtype, bound):
    """Within these shares of the range, root mean square, of random networks three levels deep."""
    model = reference()
    full, half = ours(model), ours(model).to(dtype)
    z = torch.randn(1, 8, 16, 16)
    exact = full.decode(Whole(), z)
    for execution in (Whole(), Banded("strips", 3000)):
        error = (gather(execution, half.decode, z.to(dtype)).float() - exact).square().mean().sqrt()
        assert error <= bound * (exact.max() - exact.min())


def test_keys_are_those_of_the_publisher_and_back():
    """Those of the script that made diffusers' files of them."""
    state = reference().state_dict()
    names = published_keys(state)
    assert names["encoder.down_blocks.1.conv.bias"] == "encoder.down.0.downsample.conv.bias"
    assert names["encoder.down_blocks.4.norm2.weight"] == "encoder.down.2.block.0.norm2.weight"
    assert names["decoder.up_blocks.2.conv.weight"] == "decoder.up.0.upsample.conv.weight"
    assert names["decoder.up_blocks.3.conv1.weight"] == "decoder.up.1.block.0.conv1.weight"
    assert names["encoder.mid_block.attentions.0.proj.bias"] == "encoder.mid.attn_1.proj_out.bias"
    assert diffusers_keys(names.values()) == {name: key for key, name in names.items()}
    for layout in (names, names.values()):
        assert told({key: (4, 8, 3, 3) for key in layout if "sample.conv" in key or ".conv.weight" in key})


def test_config_builds_the_same_in_diffusers():
    model = reference()
    again = Reference.from_config(diffusers_config(ours(model).config, sound=False))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_a_network_that_diffusers_cannot_build():
    with pytest.raises(UnsupportedCheckpoint, match="one more in the decoder"):
        diffusers_config(HunyuanConfig((32, 64), 2, 2, 8), sound=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder.conv_in.weight": None}, "has the key decoder.conv_in.weight"),
        ({"decoder.conv_in.weight": (64, 7, 3, 3)}, "do not divide"),
        ({"decoder.up.2.block.0.conv2.weight": (64, 64, 3, 3)}, "not one HunyuanImage VAE"),
        ({"encoder.down.0.block.0.conv2.weight": None}, "has the key encoder.down.0.block.0.conv2.weight"),
        ({"encoder.down.0.block.0.conv2.weight": (32, 32)}, "a convolution's four sides"),
    ],
)
def test_what_cannot_be(changes, reason):
    shapes = {key: tuple(value.shape) for key, value in ours(reference()).state_dict().items()} | changes
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        HunyuanConfig.from_shapes({key: shape for key, shape in shapes.items() if shape is not None})
