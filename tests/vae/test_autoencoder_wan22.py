"""Parity with diffusers on random weights: of pictures, which are clips of one frame there, and of clips."""

from collections import deque
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLQwenImage21, AutoencoderKLWan

from app.engine.forecast import CountingMode
from app.errors import UnsupportedCheckpoint
from app.execution.banded import RECOMPUTE, STRIPS, Banded, execute, forecast_bytes, gather
from app.execution.causal import Carry
from app.execution.primitive import Whole
from app.vae.architectures import ARCHITECTURES, Architecture, told
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.autoencoder_wan22 import AverageDown, DuplicateUp, patched_picture_tensors
from app.vae.layout_wan22 import diffusers_config
from tests.vae.test_autoencoder_kl import assert_same
from tests.vae.test_autoencoder_wan import sliced

WAN = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wan22": (AutoencoderKLWan, {"z_dim": 48, **WAN}),
    "wan22 RGBA": (AutoencoderKLWan, {"z_dim": 48, **WAN, "in_channels": 16, "out_channels": 16}),
    "qwenimage21": (AutoencoderKLQwenImage21, {}),
    "qwenimage21 RGB": (AutoencoderKLQwenImage21, {"in_channels": 3, "out_channels": 3}),
}


def reference(name: str) -> Any:
    """A random diffusers VAE whose norms do something, with halves of two widths."""
    make, options = MAKERS[name]
    torch.manual_seed(0)
    model = make(base_dim=8, decoder_base_dim=12, **options).eval()
    for key, value in model.named_parameters():
        if key.endswith("gamma"):
            value.data.uniform_(0.5, 1.5)
    return model


def shapes_of(state: dict[str, torch.Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def published(model: Any) -> tuple[Architecture, dict[str, torch.Tensor]]:
    """The row that is told, and the tensors by the publisher's names."""
    state = model.state_dict()
    row = told(shapes_of(state))
    names = row.keys(state)
    return row, {names[key]: value for key, value in state.items()}


def ours(row: Architecture, state: dict[str, torch.Tensor]) -> Autoencoder:
    """Our network with these weights, as they are loaded."""
    vae = row.module(row.configure(shapes_of(state), None)).eval()
    shaped = ((name, tensor.reshape(row.shape(name, tuple(tensor.shape)))) for name, tensor in state.items())
    vae.load_state_dict(dict(part for name, tensor in shaped for part in row.resident(name, tensor)), strict=True)
    return vae


@pytest.mark.parametrize("name", MAKERS)
@torch.inference_mode()
def test_a_picture_is_a_clip_of_one_frame(name):
    model = reference(name)
    vae = ours(*published(model))
    channels, z = vae.config.pixel_channels, vae.config.latent_channels
    assert (vae.config.spatial_factor, channels) == (16, 4 if name in ("wan22 RGBA", "qwenimage21") else 3)
    for batch, rows, columns in [(1, 4, 4), (2, 3, 5), (1, 7, 2)]:
        pixels = torch.randn(batch, channels, 16 * rows, 16 * columns)
        expected = model.encode(pixels[:, :, None]).latent_dist
        moments = vae.encode(Whole(), pixels)
        assert_same(moments, expected.parameters[:, :, 0])
        assert_same(vae.posterior(moments).mode(), expected.mode()[:, :, 0])
        latents = torch.randn(batch, z, rows, columns)
        assert_same(vae.decode(Whole(), latents), model.decode(latents[:, :, None]).sample[:, :, 0])


@pytest.mark.parametrize("name", ["wan22", "wan22 RGBA"])
@pytest.mark.parametrize("latents", [1, 2, 3, 5])
@torch.inference_mode()
def test_a_clip_is_that_of_diffusers_in_slices_in_bands_and_whole(name, latents):
    model = reference(name)
    row, state = published(model)
    vae = for_clips(row, state)
    z = torch.randn(latents, 48, 2, 3)
    pixels = torch.randn(1 + 4 * (latents - 1), vae.config.pixel_channels, 32, 48)
    decoded = model.decode(z.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    moments = model.encode(pixels.transpose(0, 1)[None]).latent_dist.parameters[0].transpose(0, 1)
    assert len(decoded) == len(pixels)
    assert_same(sliced(vae.decode, z, [1] * latents), decoded)
    assert_same(sliced(vae.encode, pixels, [1, *[4] * (latents - 1)]), moments)
    assert_same(gather(Banded("strips", 1), vae.decode, z), decoded)
    assert_same(gather(Banded("strips", 1), vae.encode, pixels), moments)
    carry: Carry = deque()
    found = [gather(Banded("strips", 1), vae.decode, part, carry=carry) for part in z.split(1)]
    assert_same(torch.cat(found), decoded)


def for_clips(row: Architecture, state: dict[str, torch.Tensor]) -> Autoencoder:
    """Our network for clips with these weights."""
    assert row.clips is not None
    vae = row.module(row.clips.configure(row.configure(shapes_of(state), None))).eval()
    vae.load_state_dict(dict(part for item in state.items() for part in row.clips.resident(*item)), strict=True)
    return vae


def test_pictures_alone_have_no_clips():
    row, state = published(reference("wan22"))
    flat = {name: tensor[:, :, -1] if tensor.dim() == 5 else tensor for name, tensor in state.items()}
    assert row.clips is not None
    with pytest.raises(UnsupportedCheckpoint, match="pictures alone"):
        row.clips.configure(row.configure(shapes_of(flat), None))


@pytest.mark.parametrize("execution", [STRIPS, RECOMPUTE], ids=str)
@pytest.mark.parametrize("name", ["wan22", "qwenimage21"])
@torch.inference_mode()
def test_bands_give_the_same(name, execution):
    vae = ours(*published(reference(name)))
    pixels = torch.randn(2, vae.config.pixel_channels, 304, 48)
    latents = torch.randn(2, vae.config.latent_channels, 19, 3)
    for network, x in ((vae.encode, pixels), (vae.decode, latents)):
        assert_same(gather(execution, network, x), network(Whole(), x))


@pytest.mark.parametrize(("name", "tensors", "most"), [("wan22", 196, 0.4), ("qwenimage21", 238, 0.99)])
def test_a_file_has_more_than_a_picture_runs(name, tensors, most):
    row, state = published(reference(name))
    assert (row.name, len(state)) == (name, tensors)
    resident = sum(value.numel() for value in ours(row, state).parameters())
    assert resident < most * sum(value.numel() for value in state.values())


@pytest.mark.parametrize("name", ["wan22", "qwenimage21"])
def test_keys_go_there_and_back(name):
    model = reference(name)
    row, state = published(model)
    assert row.keys(state) == {key: key for key in state}
    back = row.diffusers.keys(state)
    assert sorted(back.values()) == sorted(model.state_dict())
    theirs = model.state_dict()
    for key, value in state.items():
        assert row.diffusers.shape(key, row.shape(key, tuple(value.shape))) == tuple(theirs[back[key]].shape)


@torch.inference_mode()
def test_kernels_of_qwen_image_21_may_have_a_tap():
    row, state = published(reference("qwenimage21"))
    deep = {
        key: value[:, :, None] if value.dim() == 4 and "gamma" not in key else value for key, value in state.items()
    }
    narrow = {key: value.reshape(-1, 1, 1) if key.endswith("gamma") else value for key, value in deep.items()}
    wanted = ours(row, state)
    for other in (deep, narrow):
        assert told(shapes_of(other)) is row
        vae = ours(row, other)
        assert vae.config == wanted.config
        assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in vae.state_dict().items())
        assert {key: row.shape(key, tuple(value.shape)) for key, value in other.items()} == shapes_of(state)


@torch.inference_mode()
def test_kernels_of_wan_22_may_have_two_dimensions_but_not_for_diffusers():
    row, state = published(reference("wan22"))
    flat = {key: value[:, :, -1] if value.dim() == 5 else value for key, value in state.items()}
    assert told(shapes_of(flat)) is row
    vae, wanted = ours(row, flat), ours(row, state)
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in vae.state_dict().items())
    with pytest.raises(UnsupportedCheckpoint, match="kernels of two dimensions"):
        row.diffusers.shape("encoder.conv1.weight", tuple(flat["encoder.conv1.weight"].shape))


@pytest.mark.parametrize("name", MAKERS)
def test_diffusers_makes_the_same_network_of_what_we_write_into_its_config(name):
    model = reference(name)
    row, state = published(model)
    config: Any = row.configure(shapes_of(state), None)
    written = diffusers_config(config, False)
    built = getattr(diffusers, str(written["_class_name"])).from_config(written)
    assert shapes_of(built.state_dict()) == shapes_of(model.state_dict())
    assert (built.config.patch_size, built.config.is_residual) == (model.config.patch_size, True)


@pytest.mark.parametrize(("name", "channels"), [("wan22", 4), ("wan22", 3), ("qwenimage21", 12)])
def test_other_pictures_are_refused_by_their_channels(name, channels):
    row, state = published(reference(name))
    shapes = dict(shapes_of(state))
    for key, side in (("encoder.conv1.weight", 1), ("decoder.head.2.weight", 0)):
        shapes[key] = (*shapes[key][:side], channels, *shapes[key][side + 1 :])
    with pytest.raises(UnsupportedCheckpoint, match=f"{channels} channels in and {channels} out; 3 or 4"):
        row.configure(shapes, None)


@pytest.mark.parametrize("name", ["encoder.conv1.weight", "decoder.head.2.weight", "decoder.head.2.bias"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 0, 1, 1), (5, 5, 3, 3), (4, 4, 3, 3)])
def test_no_shape_breaks_what_is_taken_of_a_file(name, shape):
    ((key, part),) = patched_picture_tensors(name, torch.zeros(shape))
    assert (key, part.shape) == (name, torch.Size(shape))


def test_shortcuts_are_of_the_first_frame():
    x = torch.arange(1, 33.0).reshape(1, 2, 4, 4)
    mean = torch.tensor([[[3.5, 5.5], [11.5, 13.5]], [[19.5, 21.5], [27.5, 29.5]]])
    assert torch.equal(AverageDown(False)(x)[0], mean)
    assert torch.equal(AverageDown(True)(x)[0, 1::2], mean)
    assert not AverageDown(True)(x)[0, ::2].any()
    block = x[:, :, :1, :1]
    assert DuplicateUp(1, True)(block).flatten().tolist() == [1] * 4 + [17] * 4
    assert DuplicateUp(2, True)(block).flatten().tolist() == [17] * 4
    assert DuplicateUp(2, False)(block).flatten().tolist() == [1, 1, 17, 17]
    with pytest.raises(ValueError, match="no blocks"):
        AverageDown(False).shape((1, 1, 3, 4))


def test_both_rows_say_which_halves_are_whose():
    for name in ("wan22", "qwenimage21"):
        assert ARCHITECTURES[name].encoder == ("encoder.", "conv1.")


@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize("name", ["wan22", "qwenimage21"])
@pytest.mark.parametrize("band_elements", [20_000, 100_000])
def test_forecasts_hold(name, half, band_elements):
    """The memory counted in a run over bands lies at most a quarter under the forecast, and never above it."""
    vae = ours(*published(reference(name))).requires_grad_(False).to(memory_format=torch.channels_last)
    channels, z = vae.config.pixel_channels, vae.config.latent_channels
    network, x = getattr(vae, half), torch.randn(1, z, 24, 6) if half == "decode" else torch.randn(1, channels, 384, 96)
    execution = Banded("strips", band_elements)
    forecast = forecast_bytes(execution, network, tuple(x.shape), x.dtype, x.device)
    live = CountingMode([x, *vae.parameters()])
    with torch.inference_mode(), live:
        for _, band in execute(execution, network, x):
            del band
    assert live.peak <= forecast <= 1.25 * live.peak
