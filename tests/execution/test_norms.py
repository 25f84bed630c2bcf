"""The pointwise norm against its formula, in every precision, and its memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from app.engine.forecast import CountingMode
from app.execution.norms import GroupNorm, RMSNorm, global_norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0, 1e6])
def test_it_is_the_formula(bias, size):
    torch.manual_seed(0)
    norm = RMSNorm(24, bias)
    x = torch.randn(2, 24, 5, 3) * size
    expected = F.normalize(x, dim=1) * 24**0.5 * norm.gamma + (0 if norm.bias is None else norm.bias)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    norm = RMSNorm(64).to(dtype)
    x = (torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)  # squares overflow fp16
    expected = (F.normalize(x.double(), dim=1) * 8).to(dtype)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=torch.finfo(dtype).eps)


def test_it_makes_one_map():
    x = torch.randn(1, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    norm = RMSNorm(32, bias=True).requires_grad_(False)
    with CountingMode([x, *norm.parameters()]) as counted, torch.inference_mode():
        out = norm(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert counted.peak <= 1.01 * x.nbytes


def test_it_can_be_trained():
    norm = RMSNorm(8, bias=True)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    norm(x).square().sum().backward()
    assert all(value.grad is not None for value in (x, *norm.parameters()))


@pytest.mark.parametrize("size", [(2, 8, 5, 3), (1, 8, 1, 1)])
def test_group_norm_is_torch_s(size):
    torch.manual_seed(0)
    norm = GroupNorm(2, 8)
    nn.init.normal_(norm.weight)
    x = torch.randn(size)
    assert torch.equal(norm(x), F.group_norm(x, 2, norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_but_the_bias_is_left_of_a_group_of_one_value(device):
    norm = GroupNorm(8, 8).to(device)
    nn.init.normal_(norm.bias)
    x = torch.rand(1, 8, 1, 1, device=device)
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.GroupNorm.forward(norm, x)  # or GroupNorm is to go
    assert norm(x).shape == x.shape
    assert device == "meta" or torch.allclose(norm(x).flatten(), norm.bias, atol=1e-4)


def test_which_are_global():
    norm = GroupNorm(2, 4)
    assert global_norm(norm) is norm
    assert global_norm(RMSNorm(4)) is None
    assert global_norm(None) is None
