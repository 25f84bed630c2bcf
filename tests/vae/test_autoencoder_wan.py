"""Parity with diffusers on random weights, for pictures: a clip of one frame there."""

import math
from collections import deque
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

from app.errors import UnsupportedCheckpoint
from app.execution.banded import RECOMPUTE, STRIPS, Banded, gather
from app.execution.causal import Carry
from app.execution.primitive import Whole
from app.execution.slices import Sliced
from app.vae.architectures import architecture_of
from app.vae.autoencoder_wan import AutoencoderWan, WanConfig, clip_tensors, picture_tensors
from app.vae.layout_wan import diffusers_config, diffusers_keys, wan_keys
from tests.vae.test_autoencoder_kl import assert_same

CLASSES = [AutoencoderKLWan, AutoencoderKLQwenImage]
RGB: list[tuple[Any, dict[str, int]]] = [(make, {}) for make in CLASSES]
RGBA = [(AutoencoderKLWan, {"in_channels": 4, "out_channels": 4}), (AutoencoderKLQwenImage, {"input_channels": 4})]


def reference(make: Any = AutoencoderKLWan, **options: Any) -> Any:
    """A random diffusers VAE whose norms do something."""
    torch.manual_seed(0)
    model = make(base_dim=8, z_dim=16, **options).eval()
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            value.data.uniform_(0.5, 1.5)
    return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """By the publisher's names, as the file has it."""
    state = model.state_dict()
    names = wan_keys(state)
    return {names[key]: value for key, value in state.items()}


def config_of(model: Any) -> WanConfig:
    return WanConfig.from_shapes({key: tuple(value.shape) for key, value in state_of(model).items()})


def ours(model: Any) -> AutoencoderWan:
    """Our network with another's weights, as they are loaded."""
    state = state_of(model)
    vae = AutoencoderWan(config_of(model)).eval()
    parts = dict(part for name, tensor in state.items() for part in picture_tensors(name, tensor))
    vae.load_state_dict(parts, strict=True)
    return vae


@pytest.mark.parametrize(("make", "options"), [*RGB, *RGBA])
@torch.inference_mode()
def test_a_picture_is_a_clip_of_one_frame(make, options):
    model = reference(make, **options)
    vae = ours(model)
    assert vae.config.pixel_channels == (4 if options else 3)
    for batch, height, width in [(1, 64, 64), (2, 40, 56), (1, 43, 61)]:
        pixels = torch.randn(batch, vae.config.pixel_channels, height, width)
        expected = model.encode(pixels[:, :, None]).latent_dist
        moments = vae.encode(Whole(), pixels)
        assert_same(moments, expected.parameters[:, :, 0])
        assert_same(vae.posterior(moments).mode(), expected.mode()[:, :, 0])
        latents = torch.randn(batch, 16, height // 8, width // 8)
        assert_same(vae.decode(Whole(), latents), model.decode(latents[:, :, None]).sample[:, :, 0])


@torch.inference_mode()
def test_decoded_pictures_end_at_black_and_white():
    model = reference()
    model.decoder.conv_out.weight.mul_(5)
    latents = torch.randn(1, 16, 4, 4)
    decoded = ours(model).decode(Whole(), latents)
    assert (decoded.min(), decoded.max()) == (-1, 1)
    assert_same(decoded, model.decode(latents[:, :, None]).sample[:, :, 0])


@pytest.mark.parametrize("execution", [Whole(), STRIPS], ids=["whole", "strips"])
@torch.inference_mode()
def test_what_overflows_last_is_not_taken_for_black_or_white(execution):
    vae = ours(reference())
    vae.get_parameter("decoder.head.2.bias").copy_(torch.tensor([math.inf, -math.inf, 0.0]))
    decoded = gather(execution, vae.decode, torch.randn(1, 16, 4, 4))
    assert decoded.isnan().flatten(2).all(2).tolist() == [[True, True, False]]
    assert decoded[:, 2].isfinite().all()


@pytest.mark.parametrize("execution", [STRIPS, RECOMPUTE], ids=str)
@torch.inference_mode()
def test_bands_give_the_same(execution):
    vae = ours(reference())
    pixels, latents = torch.randn(2, 3, 136, 72), torch.randn(2, 16, 19, 9)
    for network, x in ((vae.encode, pixels), (vae.decode, latents)):
        assert_same(gather(execution, network, x), network(Whole(), x))


def test_a_file_has_more_than_a_picture_runs():
    state = state_of(reference())
    assert len(state) == 194
    vae = ours(reference())
    assert sum(value.numel() for value in vae.parameters()) < 0.4 * sum(value.numel() for value in state.values())
    assert not any("time_conv" in key for key in vae.state_dict())


def test_a_file_of_two_dimensions_is_the_same_network():
    model = reference()
    flat = {key: value[:, :, -1] if value.dim() == 5 else value for key, value in state_of(model).items()}
    config = WanConfig.from_shapes({key: tuple(value.shape) for key, value in flat.items()})
    assert config == WanConfig(8, 8, 16, 3, flat=True)
    parts = dict(part for name, tensor in flat.items() for part in picture_tensors(name, tensor))
    wanted = ours(model).state_dict()
    assert parts.keys() == wanted.keys()
    assert all(torch.equal(parts[key], value) for key, value in wanted.items())


def test_keys_go_there_and_back():
    for make in CLASSES:
        keys = list(reference(make).state_dict())
        names = wan_keys(keys)
        assert len(set(names.values())) == len(keys) == 194
        assert wan_keys(names.values()) == {name: name for name in names.values()}
        back = diffusers_keys(names.values())
        assert all(back[names[key]] == key for key in keys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 4}, "4 channels in and 3 out"),
        ({"out_channels": 12}, "3 channels in and 12 out.*enlarges"),
        ({"in_channels": 1, "out_channels": 1}, "1 channels in and 1 out; 3 or 4 were expected"),
    ],
)
def test_other_pictures_are_refused_by_their_channels(changes, said):
    with pytest.raises(UnsupportedCheckpoint, match=said):
        ours(reference(**changes))


def test_diffusers_makes_the_same_network_of_what_we_write_into_its_config():
    for make, options in (*RGB, *RGBA):
        model = reference(make, **options)
        config = diffusers_config(config_of(model), False)
        built = getattr(diffusers, str(config["_class_name"])).from_config(config)
        wanted = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in built.state_dict().items()} == wanted
    with pytest.raises(UnsupportedCheckpoint, match="different widths"):
        diffusers_config(WanConfig(8, 4, 16, 4), False)


@pytest.mark.parametrize(
    ("key", "shape"),
    [("encoder.conv1.weight", (8, 3)), ("decoder.head.2.weight", (3, 0, 3, 3, 3)), ("decoder.conv1.weight", None)],
)
def test_what_has_no_sides_is_refused(key, shape):
    shapes = {name: tuple(value.shape) for name, value in state_of(reference()).items()}
    if shape is None:
        del shapes[key]
    else:
        shapes[key] = shape
    with pytest.raises(UnsupportedCheckpoint, match=key):
        WanConfig.from_shapes(shapes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.middle.1.to_qkv.weight", ()),
        ("decoder.middle.1.to_qkv.weight", (0, 0, 1, 1)),
        ("decoder.conv1.weight", (4, 4, 0, 3, 3)),
        ("decoder.head.0.gamma", ()),
    ],
)
def test_no_shape_breaks_what_is_taken_of_a_file(name, shape):
    assert all(part.numel() in (0, 1) for _, part in picture_tensors(name, torch.zeros(shape)))


def clips(model: Any) -> AutoencoderWan:
    """Our network for clips with another's weights."""
    vae = AutoencoderWan(config_of(model).for_clips()).eval().requires_grad_(False)
    state = state_of(model)
    parts = dict(part for name, tensor in state.items() for part in clip_tensors(name, tensor))
    vae.load_state_dict(parts, strict=True)
    return vae


def sliced(network: Any, frames: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """A network of clips over slices of frames (T, C, h, w)."""
    carry: Carry = deque()
    return torch.cat([network(Sliced(carry), part) for part in frames.split(sizes)])


@pytest.mark.parametrize(("make", "options"), [*RGB, RGBA[0]])
@pytest.mark.parametrize("latents", [1, 2, 3, 5])
@torch.inference_mode()
def test_a_clip_is_that_of_diffusers_in_slices_and_whole(make, options, latents):
    model = reference(make, **options)
    vae = clips(model)
    z = torch.randn(latents, 16, 4, 5)
    pixels = torch.randn(1 + 4 * (latents - 1), vae.config.pixel_channels, 32, 40)
    decoded = model.decode(z.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    moments = model.encode(pixels.transpose(0, 1)[None]).latent_dist.parameters[0].transpose(0, 1)
    assert len(decoded) == len(pixels)
    assert_same(sliced(vae.decode, z, [1] * latents), decoded)
    assert_same(sliced(vae.decode, z, [latents]), decoded)
    assert_same(sliced(vae.encode, pixels, [1, *[4] * (latents - 1)]), moments)
    assert_same(sliced(vae.encode, pixels, [len(pixels)]), moments)
    assert_same(gather(Banded("strips", 1), vae.decode, z), decoded)
    assert_same(gather(Banded("strips", 1), vae.encode, pixels), moments)


@torch.inference_mode()
def test_the_first_frame_of_a_clip_is_a_picture():
    model = reference()
    z = torch.randn(2, 16, 4, 5)
    assert_same(sliced(clips(model).decode, z, [1, 1])[:1], ours(model).decode(Whole(), z[:1]))


def test_clips_run_all_that_a_file_has():
    model = reference()
    vae = clips(model)
    assert sum(value.numel() for value in vae.parameters()) == sum(value.numel() for value in model.parameters())
    factors = [architecture_of(each.config).temporal_factor for each in (ours(model), vae)]
    assert factors == [1, 4]
    with pytest.raises(UnsupportedCheckpoint, match="pictures alone"):
        WanConfig(8, 8, 16, flat=True).for_clips()
