"""Functions without neighbours against torch's own words for them, and linear attention against its definition."""

import pytest
import torch
from torch.nn import functional as F

from app.execution.norms import AffineRMSNorm
from app.execution.pointwise import (
    Add,
    Average,
    Gate,
    Join,
    LinearAttention,
    Repeat,
    ToChannels,
    ToSpace,
)


def blocks_to_space(x):
    """The order of HunyuanImage: which of the block comes first, then the channel."""
    b, c, h, w = x.shape
    return x.reshape(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


def space_to_blocks(x):
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def shape_of(x):
    b, c, h, w = x.shape
    return b, c, h, w


def mean(x, of):
    return x.unflatten(1, (-1, of)).mean(dim=2)


NORM = AffineRMSNorm(8, 1e-5).requires_grad_(False)
NORM.weight.normal_()
NORM.bias.normal_()
X, Y = torch.randn(2, 8, 6, 10), torch.randn(2, 8, 6, 10)
CASES = {
    "to space": (ToSpace(), [X], F.pixel_shuffle(X, 2)),
    **{f"to space, {n} times": (ToSpace(n), [X], F.pixel_shuffle(X.repeat_interleave(n, 1), 2)) for n in (2, 4, 8)},
    "blocks to space": (ToSpace(blocks_first=True), [X], blocks_to_space(X)),
    "to channels": (ToChannels(), [X], F.pixel_unshuffle(X, 2)),
    **{f"to channels, means of {n}": (ToChannels(n), [X], mean(F.pixel_unshuffle(X, 2), n)) for n in (2, 4, 8)},
    "space to blocks": (ToChannels(blocks_first=True), [X], space_to_blocks(X)),
    "repeated": (Repeat(3), [X], X.repeat_interleave(3, dim=1)),
    "averaged": (Average(4), [X], mean(X, 4)),
    "joined": (Join(), [X, Y], torch.cat([X, Y], dim=1)),
    "gated": (Gate(), [X], X[:, :4] * F.silu(X[:, 4:])),
    "added": (Add(), [X, Y], X + Y),
    "normed and added": (Add(NORM), [X, Y], NORM(X) + Y),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_is_what_torch_says(name, layout):
    function, sources, expected = CASES[name]
    sources = [x.contiguous(memory_format=layout) for x in sources]
    kept = [x.clone() for x in sources]
    out = function(*sources)
    torch.testing.assert_close(out, expected)
    assert tuple(out.shape) == function.shape(*map(shape_of, sources))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(x, before) for x, before in zip(sources, kept, strict=True))
    assert not any(out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in sources)


def test_the_affine_norm_is_the_formula():
    expected = X / (X.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = expected * NORM.weight[:, None, None] + NORM.bias[:, None, None]
    torch.testing.assert_close(NORM(X), expected)


def by_definition(x, width):
    """Every position's weights over all positions, in float64."""
    b, c, h, w = x.shape
    q, k, v = x.double().reshape(b, -1, 3, width, h * w).unbind(2)
    weights = q.relu().transpose(2, 3) @ k.relu()  # (B, heads, positions, positions)
    weights = weights / weights.sum(dim=3, keepdim=True)
    return (v @ weights.transpose(2, 3)).reshape(b, c // 3, h, w)


@pytest.mark.parametrize("bands", [[6], [1, 5], [2, 2, 2]])
def test_linear_attention_is_its_definition(bands):
    x = torch.randn(2, 3 * 8 * 4, 6, 10)
    attention = LinearAttention(8)
    totals = attention.totals()
    for band in x.split(bands, dim=2):
        totals.add(band)
    expected = by_definition(x, 8).float().nan_to_num(0.0)  # where no key answers a query
    out = torch.cat([attention.applied(band, totals) for band in x.split(bands, dim=2)], dim=2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention(x), out, atol=1e-6, rtol=1e-5)
    assert totals.products.numel() == attention.totalled(shape_of(x))


def test_sums_are_in_float32():
    """Sums of float16 would be infinite here, and those of bfloat16 stand still."""
    x = torch.full((1, 24, 64, 64), 8.0)
    for dtype in (torch.float16, torch.bfloat16):
        out = LinearAttention(8)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), torch.full_like(out, 8.0).float())


def test_positions_without_an_answer_are_zero():
    """Where no key answers, numerator and denominator are zero."""
    x = torch.randn(1, 24, 2, 2)
    x[:, 8:16] = -1.0
    assert torch.equal(LinearAttention(8)(x), torch.zeros(1, 8, 2, 2))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (ToSpace(), [(1, 6, 2, 2)]),
        (ToChannels(), [(1, 4, 3, 2)]),
        (ToChannels(3), [(1, 4, 2, 2)]),
        (Average(3), [(1, 4, 2, 2)]),
        (Gate(), [(1, 3, 2, 2)]),
        (Add(), [(1, 4, 2, 2), (1, 4, 2, 3)]),
        (LinearAttention(8), [(1, 25, 2, 2)]),
    ],
)
def test_what_does_not_fit_is_refused(function, shapes):
    with pytest.raises(ValueError, match=r"channels|cannot be added"):
        function.shape(*shapes)
