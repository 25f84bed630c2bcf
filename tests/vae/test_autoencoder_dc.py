"""Parity with diffusers on random weights: every form of the network, encode and decode, several sizes, batch 2."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC as Reference
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.execution.banded import Banded, gather
from app.execution.primitive import Whole
from app.vae.autoencoder_dc import AutoencoderDC, DCConfig
from app.vae.layout_dc import canonical_shape, diffusers_config, published_keys

TOLERANCE = 1e-4  # of the output's range, in float32
SIZES = [(1, 8, 8), (2, 5, 7), (1, 16, 3)]  # batch, height, width of the latent
EXECUTIONS = {
    "whole": Whole(),
    "strips of a row": Banded("strips", 1),
    "strips": Banded("strips", 3000),
    "recompute by the row": Banded("recompute", 1),
    "recompute": Banded("recompute", 3000),
}
FORMS: dict[str, dict[str, Any]] = {
    "as Sana's": {},
    "shuffled": {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
    "a step at once": {"encoder_layers_per_block": (0, 1, 2), "decoder_layers_per_block": (0, 2, 1)},
    "a step at once, shuffled": {
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "encoder_layers_per_block": (0, 1, 2),
        "decoder_layers_per_block": (0, 2, 1),
    },
    "a narrow view": {
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "encoder_block_out_channels": (16, 32, 64),
        "decoder_block_out_channels": (16, 32, 64),
        "attention_head_dim": 32,
    },
}


def reference(form: str = "as Sana's", **changes: Any) -> Any:
    """A random AutoencoderDC of diffusers: small, with every layer that the form has."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (16, 32, 32),
        "decoder_block_out_channels": (16, 32, 32),
        "encoder_layers_per_block": (1, 1, 2),
        "decoder_layers_per_block": (1, 2, 1),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
        "latent_channels": 8,
        "attention_head_dim": 8,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
    }
    model = Reference(**(options | FORMS[form] | changes)).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def ours(model: Any) -> AutoencoderDC:
    """Our network with another's weights, through the rename table and the strict load."""
    state = model.state_dict()
    names = published_keys(state)
    shaped = {
        names[key]: value.reshape(canonical_shape(names[key], tuple(value.shape))) for key, value in state.items()
    }
    vae = AutoencoderDC(DCConfig.from_shapes({name: tuple(value.shape) for name, value in shaped.items()})).eval()
    vae.load_state_dict(shaped, strict=True)
    return vae.requires_grad_(False).to(memory_format=torch.channels_last)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    span = (expected.max() - expected.min()).item()
    assert span > 0.01
    assert (got - expected).abs().max().item() <= TOLERANCE * span


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_is_diffusers(form, execution):
    model = reference(form)
    vae = ours(model)
    for batch, h, w in SIZES:
        z, pixels = torch.randn(batch, 8, h, w), torch.randn(batch, 3, 4 * h, 4 * w)
        assert_same(gather(execution, vae.decode, z), model.decode(z).sample)
        latents = gather(execution, vae.encode, pixels)
        assert_same(latents, model.encode(pixels).latent)
        assert torch.equal(vae.posterior(latents).sample(torch.Generator()), latents)


@pytest.mark.parametrize("position", [(1, 1), (4, 8), (5, 7)])
@torch.inference_mode()
def test_few_positions_are_diffusers_too(position):
    """diffusers takes the quadratic form where there are no more positions than a head has channels."""
    model = reference("a narrow view")
    vae = ours(model)
    z = torch.randn(2, 8, *position)
    assert_same(vae.decode(Whole(), z), model.decode(z).sample)


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


@pytest.mark.parametrize("form", FORMS)
def test_config_builds_the_same_in_diffusers(form):
    model = reference(form)
    content = diffusers_config(ours(model).config, sound=False)
    again = Reference.from_config(content)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_batch_norms_are_named():
    model = reference(decoder_norm_types=("batch_norm", "rms_norm", "rms_norm"))
    with pytest.raises(UnsupportedCheckpoint, match="batch norms"):
        ours(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder.project_in.main.conv.weight": None}, "has the key decoder.project_in.main.conv.weight"),
        ({"decoder.project_in.main.conv.weight": (32, 7, 3, 3)}, "do not divide"),
        ({"encoder.stages.9000.op_list.0.main.conv2.conv.weight": (8, 8, 3, 3)}, "has keys encoder.stages"),
        ({"encoder.stages.3.op_list.0.main.conv2.conv.weight": (24, 24, 3, 3)}, "encoder has 4 levels, decoder 3"),
        ({"encoder.stages.4.op_list.0.main.conv2.conv.weight": (24, 24, 3, 3)}, "blocks in encoder.stages.3"),
        ({"encoder.stages.1.op_list.0.main.conv2.conv.weight": (0, 0, 3, 3)}, "that of a convolution was expected"),
    ],
)
def test_what_cannot_be(changes, reason):
    shapes = {key: tuple(value.shape) for key, value in ours(reference()).state_dict().items()} | changes
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        DCConfig.from_shapes({key: shape for key, shape in shapes.items() if shape is not None})
