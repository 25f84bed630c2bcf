"""scale() and unscale() undo each other, and agree with the pipelines that they stand for."""

import pytest
import torch
from torch import nn

from app.vae.families import FAMILIES
from app.vae.latent_format import LatentFormat

EPS = 1e-4  # of FLUX.2's BatchNorm


def raw_latents(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 6, 10, generator=torch.Generator().manual_seed(0)) * 3


def statistics(channels: int) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(1)
    norm = nn.BatchNorm2d(channels, eps=EPS, affine=False)
    norm.running_mean = torch.randn(channels, generator=generator)
    norm.running_var = torch.rand(channels, generator=generator) + 0.1
    return norm


def patchified(raw: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, 4C, h / 2, w / 2), channels in the order (c, y, x), as diffusers' FLUX.2 pipeline has it."""
    b, c, h, w = raw.shape
    return raw.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_unscale_undoes_scale(row):
    form, raw = row.latent_format, raw_latents(row.latent_channels)
    norm = statistics(4 * row.latent_channels) if form.statistics else None
    scaled = form.scale(raw, norm)
    assert scaled.shape == (2, row.latent_channels * form.patch**2, 6 // form.patch, 10 // form.patch)
    torch.testing.assert_close(form.unscale(scaled, norm), raw, atol=1e-5, rtol=1e-5)


def test_the_shift_goes_before_the_scale():
    assert LatentFormat(2.0, 0.5).scale(torch.full((1, 1, 1, 1), 3.0)).item() == 5.0
    assert LatentFormat(2.0, 0.5).unscale(torch.full((1, 1, 1, 1), 5.0)).item() == 3.0


MEAN, STD = (0.5, -1.25, 0.1), (2.0, 0.5, 3.7)
BY_CHANNEL = LatentFormat(tuple(1 / each for each in STD), MEAN)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 5)], ids=str)  # pictures, and frames of a film
def test_a_mean_and_a_deviation_per_channel(shape):
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(3, *(1,) * (raw.dim() - 2)) for each in (MEAN, STD))
    scaled = BY_CHANNEL.scale(raw)
    torch.testing.assert_close(scaled, (raw - mean) / std)
    torch.testing.assert_close(BY_CHANNEL.unscale(scaled), raw)


def test_numbers_per_channel_are_of_the_packed_channels():
    form = LatentFormat(tuple(range(1, 13)), patch=2)
    raw = raw_latents(3)
    torch.testing.assert_close(form.scale(raw), patchified(raw) * torch.arange(1.0, 13).view(12, 1, 1))
    torch.testing.assert_close(form.unscale(form.scale(raw)), raw)


def test_numbers_per_channel_leave_half_precision_alone_and_round_once():
    raw = raw_latents(3).half()
    scaled = BY_CHANNEL.scale(raw)
    assert scaled.dtype == BY_CHANNEL.unscale(scaled).dtype == torch.float16
    assert torch.equal(scaled, BY_CHANNEL.scale(raw.float()).half())


def test_one_of_the_constants_may_be_one_number():
    raw = raw_latents(3)
    torch.testing.assert_close(LatentFormat(2.0, MEAN).scale(raw), (raw - torch.tensor(MEAN).view(3, 1, 1)) * 2)
    assert hash(BY_CHANNEL) == hash(LatentFormat(BY_CHANNEL.scaling_factor, MEAN))


def test_numbers_for_other_channels_are_an_error():
    with pytest.raises(ValueError, match="3 channels for latents of 4"):
        BY_CHANNEL.unscale(raw_latents(4))


def test_flux2_is_patchified_then_normalised():
    raw, norm = raw_latents(32), statistics(128)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, std = norm.running_mean.view(1, -1, 1, 1), (norm.running_var + EPS).sqrt().view(1, -1, 1, 1)
    expected = (patchified(raw) - mean) / std
    torch.testing.assert_close(FAMILIES["flux2"].latent_format.scale(raw, norm), expected)


def test_taef2_takes_the_same_packed_form():
    raw = raw_latents(32)
    assert torch.equal(FAMILIES["taef2"].latent_format.scale(raw), patchified(raw))


def test_half_precision_keeps_its_dtype():
    raw, norm = raw_latents(32).half(), statistics(128)
    form = FAMILIES["flux2"].latent_format
    assert form.scale(raw, norm).dtype == torch.float16
    assert form.unscale(form.scale(raw, norm), norm).dtype == torch.float16


def test_a_norm_without_statistics_is_an_error():
    norm = nn.BatchNorm2d(128, affine=False, track_running_stats=False)
    with pytest.raises(ValueError, match="no running statistics"):
        FAMILIES["flux2"].latent_format.scale(raw_latents(32), norm)
