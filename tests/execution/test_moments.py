"""Statistics of bands against those of the whole map."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from app.execution.moments import Moments, normalise


def moments(x, rows):
    found = Moments()
    for band in x.split(rows, dim=2):
        found.add(band.contiguous(memory_format=torch.channels_last))
    return found


def applied(x, scale, shift):
    out = torch.empty_like(x, memory_format=torch.channels_last)
    normalise(x.contiguous(memory_format=torch.channels_last), scale, shift, out)
    return out


def norm(groups, channels, affine=True):
    made = nn.GroupNorm(groups, channels, affine=affine)
    if affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made.requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("affine", [True, False])
def test_bands_of_any_height_give_group_norm(rows, affine):
    torch.manual_seed(0)
    x = torch.randn(3, 16, 16, 5) * torch.tensor([0.1, 1.0, 30.0])[:, None, None, None]
    layer = norm(4, 16, affine)
    torch.testing.assert_close(applied(x, *moments(x, rows).scale_and_shift(layer)), layer(x), atol=2e-6, rtol=1e-5)


def test_large_mean_and_tiny_variance():
    """E[x^2] - E[x]^2 in float32 has no digit left here; even bands with means far apart must do."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 64, 16) * 1e-2 + 300 + torch.arange(64.0)[:, None] * 1e-3).double()
    exact = F.group_norm(x, 2)
    scale, shift = moments(x.float(), 5).scale_and_shift(norm(2, 8, affine=False))
    std = x.view(2, -1).std(dim=1, correction=0)
    torch.testing.assert_close(scale[0, ::4].double(), 1 / (std**2 + 1e-5).sqrt(), atol=0, rtol=1e-3)
    # x itself has only 2e-5 of absolute precision at 300
    assert (applied(x.float(), scale, shift).double() - exact).abs().max() < 1e-2
    naive = x.float().square().view(2, -1).mean(1) - x.float().view(2, -1).mean(1).square()
    assert ((naive.double() - std**2).abs() / std**2).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 12, 8) * 3 + 5).to(dtype)
    layer = norm(4, 16)
    scale, shift = moments(x, 5).scale_and_shift(layer)
    assert scale.dtype == shift.dtype == torch.float32
    exact = layer(x.float())
    ours = (applied(x, scale, shift).float() - exact).square().mean().sqrt()
    rounding = (exact.to(dtype).float() - exact).square().mean().sqrt()
    assert ours <= 1.01 * rounding


def test_items_of_a_batch_are_apart():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8)
    x[1] = float("nan")
    out = applied(x, *moments(x, 3).scale_and_shift(norm(2, 8)))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_on_meta():
    x = torch.empty(2, 8, 8, 8, device="meta")
    assert applied(x, *moments(x, 3).scale_and_shift(norm(2, 8).to("meta"))).shape == x.shape
