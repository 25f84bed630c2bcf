"""Tiles against the convolution that torch has."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from app.engine.forecast import CountingMode
from app.execution import preparing, winograd
from app.execution.moments import prepare as norm_of
from app.execution.norms import RMSNorm
from app.execution.preparing import prepare
from app.execution.primitive import Whole
from app.execution.program import record
from app.execution.winograd import KERNELS, LEAST, convolve, kernels_of, transformed, workspace

ROUNDING = 2e-5  # of the range, in float32
COPY = norm_of(None, None)


@pytest.fixture(autouse=True)
def _kernels_for_narrow_layers(monkeypatch):
    monkeypatch.setattr(preparing, "CHANNELS", 64)


def conv(c_in=64, c_out=64, **how):
    torch.manual_seed(0)
    return nn.Conv2d(c_in, c_out, **{"kernel_size": 3, "padding": 1, **how}).requires_grad_(False)


def prepared(network, shape=(1, 64, 8, 8)):
    assert prepare([record(network, shape)])


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUNDING * (expected.max() - expected.min())


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (2, 9), (13, 18), (24, 7), (17, 32)])
@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("tiles", [1, 3, 128])
@pytest.mark.parametrize("bias", [True, False])
def test_any_map_in_any_strips(monkeypatch, size, above, tiles, bias):
    """In double precision, where nothing hides: maps of whole tiles and of parts, in one strip and in many."""
    monkeypatch.setattr(winograd, "TILES", tiles)
    monkeypatch.setattr(winograd, "STRIP", 4 * 10 * 3 if tiles == 1 else 1 << 20)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    x, shift = x.contiguous(memory_format=torch.channels_last), torch.randn(5, dtype=torch.float64) if bias else None
    expected = F.conv2d(x, weight, shift, padding=1)
    more = torch.randn_like(expected)
    window = x if above else F.pad(x, (0, 0, 1, 1)).contiguous(memory_format=torch.channels_last)
    for add in (None, more):
        found = convolve(window, transformed(weight), shift, COPY, above, add)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected if add is None else expected + add, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    "norm", [None, nn.GroupNorm(8, 64), RMSNorm(64, bias=True)], ids=lambda norm: type(norm).__name__
)
@pytest.mark.parametrize("act", [None, F.silu, F.relu])
def test_the_whole_primitive_is_the_same(norm, act):
    layer, x, more = conv(), 3 + 2 * torch.randn(2, 64, 33, 40), torch.randn(2, 64, 33, 40)
    for value in () if norm is None else norm.parameters():
        nn.init.normal_(value.requires_grad_(False), 1, 0.3)
    whole = partial(Whole().conv, x, layer, norm=norm, act=act, add=more, then=F.relu)
    kept, kept_more = x.clone(), more.clone()
    expected = whole()
    prepared(lambda run, x: run.conv(x, layer))
    with torch.inference_mode():
        found = whole()
    close(found, expected)
    assert not torch.equal(found, expected)  # it ran another way
    assert torch.equal(x, kept)
    assert torch.equal(more, kept_more)


def test_which_layers_have_kernels():
    usual, narrow, grouped, strided, wide = (
        conv(),
        conv(64, 32),
        conv(groups=2),
        conv(stride=2),
        conv(kernel_size=5, padding=2),
    )
    padded, edged, doubled, half = conv(), conv(padding_mode="replicate"), conv(), conv().bfloat16()

    def network(run, x):
        for each in (usual, grouped, edged, wide, half):
            x = run.conv(x, each)
        x = run.conv(run.conv(x, padded, pad=(0, 2, 0, 2)), doubled, up=True)
        return run.conv(run.conv(x, strided), narrow)

    assert prepare([record(network, (1, 64, 8, 8))] * 2) == 36 * 64 * 64 * 4
    layers = (usual, narrow, grouped, strided, wide, padded, edged, doubled, half)
    assert [KERNELS in dict(each.named_buffers()) for each in layers] == [True] + 8 * [False]
    assert list(usual.state_dict()) == ["weight", "bias"]


def test_small_maps_and_half_precision_have_none():
    layer = conv()
    side = int(LEAST**0.5)
    assert kernels_of(layer, side, side) is None
    prepared(lambda run, x: run.conv(x, layer))
    assert kernels_of(layer, side, side) is layer.get_buffer(KERNELS)
    assert kernels_of(layer, side, side - 1) is None
    assert kernels_of(layer.bfloat16(), side, side) is None


def test_gradients_come_through_the_layer_as_it_is():
    layer, x = conv(), torch.randn(1, 64, 32, 32, requires_grad=True)
    prepared(lambda run, x: run.conv(x, layer))
    out = Whole().conv(x, layer)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_an_item_is_the_same_in_every_batch_and_keeps_its_nans():
    layer, x = conv(), torch.randn(3, 64, 32, 36)
    prepared(lambda run, x: run.conv(x, layer))
    x[1, 0, 5, 5] = float("nan")
    with torch.inference_mode():
        alone, together = Whole().conv(x[2:], layer), Whole().conv(x, layer)
    assert torch.equal(alone[0], together[2])
    assert together.isfinite().flatten(1).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(1, 64, 40, 72), (2, 96, 33, 600)])
def test_the_workspace_is_what_it_takes(shape):
    items, channels, height, width = shape
    layer = conv(channels, 64)
    kernels, x = transformed(layer.weight), torch.randn(shape).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), CountingMode([x, kernels, layer.bias]) as counted:
        out = convolve(x, kernels, layer.bias, COPY, 1)
    needed = 4 * workspace(items, channels, 64, height, width)
    assert needed <= counted.peak - out.nbytes <= needed + (64 << 10)
    x, kernels, bias = (each.to("meta") for each in (x, kernels, layer.bias))
    with torch.inference_mode(), CountingMode([x, kernels, bias]) as on_meta:
        convolve(x, kernels, bias, COPY, 1)
    assert on_meta.peak == pytest.approx(counted.peak, rel=0.02)
