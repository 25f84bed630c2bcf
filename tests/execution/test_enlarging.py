"""Four 2x2 convolutions against the one of the doubled map."""

import pytest
import torch
from torch.nn import functional as F

from app.execution.enlarging import enlarge, merged


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
