"""Parity of the tiny autoencoders: with diffusers where it has them, else with the architecture spelled out here."""

from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from diffusers import AutoencoderTiny as Reference
from torch import Tensor, nn

from app.errors import UnsupportedCheckpoint
from app.execution.primitive import Whole
from app.vae.autoencoder_tiny import AutoencoderTiny, TinyConfig
from app.vae.layout_tiny import taesd_keys

TOLERANCE = 1e-4  # of the output's range, in float32
WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"


def conv(c_in: int, c_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class ReferenceBlock(nn.Module):
    """TAESD's block; with `pool`, TAEF2's, which adds a normalised 1x1 branch first."""

    def __init__(self, c_in: int, c_out: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(c_in, c_out), nn.ReLU(), conv(c_out, c_out), nn.ReLU(), conv(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(c_in, 4 * c_in, 1, bias=False),
                nn.GroupNorm(4, 4 * c_in),
                nn.ReLU(),
                nn.Conv2d(4 * c_in, c_in, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + self.skip(x))


def stage(width: int, blocks: int = 3, pool: bool = False) -> list[nn.Module]:
    return [ReferenceBlock(width, width, pool) for _ in range(blocks)]


def down(c_in: int, c_out: int) -> list[nn.Module]:
    return [conv(c_in, c_out, stride=2, bias=False)]


def up(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), conv(c_in, c_out, bias=False)]


def f8_halves(z: int, w: int, pool: bool = False) -> tuple[nn.Sequential, nn.Sequential]:
    """TAESD at 1/8; with `pool`, TAEF2: the branch is in the blocks of the coarsest level."""
    encoder = [conv(3, w), *stage(w, 1)]
    for level in range(3):
        encoder += [*down(w, w), *stage(w, pool=pool and level == 2)]
    decoder = [SoftClamp(), conv(z, w), nn.ReLU(), *stage(w, pool=pool)]
    decoder += [*up(w, w), *stage(w), *up(w, w), *stage(w), *up(w, w), *stage(w, 1), conv(w, 3)]
    return nn.Sequential(*encoder, conv(w, z)), nn.Sequential(*decoder)


def f32_halves(z: int, w: int) -> tuple[nn.Sequential, nn.Sequential]:
    """TAESANA at 1/32: a strided stem with ReLUs, and a decoder that narrows from 4w to w."""
    encoder = [conv(3, w // 2, stride=2), nn.ReLU(), conv(w // 2, w, stride=2), nn.ReLU(), *stage(w, 1)]
    for _ in range(3):
        encoder += [*down(w, w), *stage(w)]
    decoder = [SoftClamp(), conv(z, 4 * w), nn.ReLU(), *stage(4 * w), *up(4 * w, 2 * w), *stage(2 * w), *up(2 * w, w)]
    decoder += [*stage(w), *up(w, w), *stage(w), *up(w, w), *stage(w), *up(w, w), *stage(w, 1), conv(w, 3)]
    return nn.Sequential(*encoder, conv(w, z)), nn.Sequential(*decoder)


def ours(state: dict[str, Tensor]) -> AutoencoderTiny:
    names = taesd_keys(state)
    state = {names[key]: value for key, value in state.items()}
    vae = AutoencoderTiny(TinyConfig.from_shapes({key: tuple(value.shape) for key, value in state.items()})).eval()
    vae.load_state_dict(state, strict=True)
    return vae


def joined(encoder: nn.Module, decoder: nn.Module) -> dict[str, Tensor]:
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict()


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    span = (expected.max() - expected.min()).item()
    assert span > 1e-3
    assert (got - expected).abs().max().item() <= TOLERANCE * span


@pytest.mark.parametrize("channels", [4, 16])
@torch.inference_mode()
def test_taesd_is_diffusers(channels):
    torch.manual_seed(0)
    model = Reference(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, latent_channels=channels
    ).eval()
    vae = ours(model.state_dict())
    for batch, height, width in [(1, 64, 64), (2, 40, 56), (1, 43, 61)]:
        pixels = torch.rand(batch, 3, height, width)
        assert_same(vae.encode(Whole(), pixels), model.encode(pixels * 2 - 1).latents)
    for batch, height, width in [(1, 8, 8), (2, 5, 7), (1, 1, 9)]:
        latents = torch.randn(batch, channels, height, width) * 4
        assert_same(vae.decode(Whole(), latents), model.decode(latents).sample / 2 + 0.5)


@pytest.mark.parametrize(
    ("halves", "channels", "factor"),
    [
        (f8_halves(4, 8), 4, 8),
        (f8_halves(32, 8, pool=True), 32, 8),
        (f32_halves(32, 8), 32, 32),
    ],
    ids=["taesd", "taef2", "taesana"],
)
@torch.inference_mode()
def test_every_variant_is_its_architecture(halves, channels, factor):
    torch.manual_seed(0)
    encoder, decoder = halves
    vae = ours(joined(encoder, decoder))
    assert vae.config.latent_channels == channels
    assert vae.config.spatial_factor == factor
    for batch, rows, columns in [(1, 2, 2), (2, 1, 3)]:
        pixels = torch.rand(batch, 3, rows * factor, columns * factor)
        latents = torch.randn(batch, channels, rows, columns) * 4
        assert_same(vae.encode(Whole(), pixels), encoder(pixels))
        assert_same(vae.decode(Whole(), latents), decoder(latents))


def shapes_of(encoder: nn.Module, decoder: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in joined(encoder, decoder).items()}


def test_halves_of_two_models_are_refused():
    with pytest.raises(UnsupportedCheckpoint, match="encoder reduces 8 times, decoder enlarges 32 times"):
        TinyConfig.from_shapes(shapes_of(f8_halves(32, 8)[0], f32_halves(32, 8)[1]))


@pytest.mark.parametrize(
    ("key", "shape"),
    [("encoder.1.conv.4.weight", ()), ("encoder.0.weight", (8,)), ("decoder.1.weight", (8, 0, 3, 3))],
)
def test_a_shape_that_is_no_convolution_is_refused(key, shape):
    with pytest.raises(UnsupportedCheckpoint, match="neither a convolution nor a block"):
        TinyConfig.from_shapes(shapes_of(*f8_halves(4, 8)) | {key: shape})


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the TAEF2 weights are not beside the repository")
@torch.inference_mode()
def test_taef2_takes_a_photograph_there_and_back():
    halves = f8_halves(32, 64, pool=True)
    for module, half in zip(halves, ("encoder", "decoder"), strict=True):
        module.load_state_dict(torch.load(WEIGHTS / f"taef2_{half}.pth", weights_only=True))
    vae = ours(joined(*halves))
    photograph = torch.from_numpy(skimage.data.astronaut()[:256, :256].copy()).permute(2, 0, 1)[None] / 255
    latents = vae.encode(Whole(), photograph)
    assert_same(latents, halves[0](photograph))
    again = vae.decode(Whole(), latents).clamp(0, 1)
    psnr = -10 * (again - photograph).square().mean().log10().item()
    assert psnr >= 30
