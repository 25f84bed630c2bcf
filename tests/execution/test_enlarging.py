"""Four 2x2 convolutions against the one of the doubled map."""

import pytest
import torch
from torch.nn import functional as F

from app.engine.forecast import CountingMode
from app.execution.enlarging import enlarge, enlarged, merged
from app.execution.primitive import Whole


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 1), (3, 4), (3, 10), (4, 9), (5, 12), (11, 12)])
def test_any_rows_of_the_doubled_maps_convolution(start, stop, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    shift = torch.randn(3, dtype=torch.float64) if bias else None
    whole = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, shift, padding=1)
    window = F.pad(x, (0, 0, 1, 1))[:, :, start // 2 :]
    rows = enlarge(window, merged(weight), shift, start % 2, stop - start)
    torch.testing.assert_close(rows, whole[:, :, start:stop], atol=1e-5, rtol=1e-5)


def test_merging_rounds_once():
    weight = torch.randn(3, 4, 3, 3).bfloat16()
    even, odd = merged(weight)
    assert even.dtype == torch.bfloat16
    assert torch.equal(even[0, :, 1, 1], weight[0, :, 1:, 1:].float().sum(dim=(1, 2)).bfloat16())
    assert torch.equal(odd[3:, :, 1, 1], weight[:, :, 2, 2])


@pytest.mark.parametrize(
    "how", [{}, {"bias": False}, {"groups": 2}, {"padding_mode": "replicate"}, {"padding": 0}, {"stride": 2}], ids=str
)
def test_whole_maps_are_enlarged_as_torch_does(how):
    """With the doubling folded into the weights where it can be, and never where gradients are wanted."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, **{"kernel_size": 3, "padding": 1, **how})
    x = torch.randn(2, 4, 5, 7)
    expected = conv(F.interpolate(x, scale_factor=2.0))
    assert torch.equal(Whole().conv(x, conv, up=True), expected)
    with torch.inference_mode():
        torch.testing.assert_close(Whole().conv(x, conv, up=True), expected, atol=1e-5, rtol=1e-5)


def test_a_whole_map_that_is_doubled_is_never_made():
    conv = torch.nn.Conv2d(8, 2, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 8, 32, 32)
    with torch.inference_mode(), CountingMode([x, *conv.parameters()]) as counted:
        out = enlarged(x, conv.weight, conv.bias)
    assert out.shape == (1, 2, 64, 64)
    assert counted.peak < 4 * x.nbytes
