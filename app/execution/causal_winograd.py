"""Knows Winograd's F(4x4, 3x3) for causal clips: 36 multiplications a tap in time per 4x4 outputs, instead of 144.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308. A tile of 6x6 inputs is
multiplied by the Kronecker square of B^T, then by the kernels, and what that gives by the Kronecker square of A^T:
matrix products all. A tile's frames lie side by side, so that the taps in time are one product, and each frame is
transformed once for the three that see it. In float32 alone: half precision has no digits to spare.

The points are 0, +-5/8, +-3/2 and infinity: half the error of the usual 0, +-1, +-2. See Barabasz et al., "Error
Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", arXiv:1803.10986.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

TILE, SIDE = 4, 6  # outputs, and the inputs that they need, along one side of a tile
POINTS = SIDE * SIDE
TILES = 64  # of each frame at once: more leave the cache, fewer leave the processor idle
STRIP = 1 << 20  # numbers of prepared rows at once
KERNELS = 1 << 25  # numbers of transformed weights at once; of wider layers, some outputs after the others

LEAST_POSITIONS = 1 << 10  # of a slice, all frames: below, transforming the weights takes longer than is won
LEAST_IN, LEAST_OUT = 16, 64  # channels: below, the products are too thin

_P, _Q = 5 / 8, 3 / 2
_P2, _Q2 = _P * _P, _Q * _Q
_B = (
    (_P2 * _Q2, 0, -_P2 - _Q2, 0, 1, 0),
    (0, -_P * _Q2, -_Q2, _P, 1, 0),
    (0, _P * _Q2, -_Q2, -_P, 1, 0),
    (0, -_Q * _P2, -_P2, _Q, 1, 0),
    (0, _Q * _P2, -_P2, -_Q, 1, 0),
    (0, _P2 * _Q2, 0, -_P2 - _Q2, 0, 1),
)
_G = (
    (1 / (_P2 * _Q2), 0, 0),
    *((1 / n, p / n, p * p / n) for p, n in ((p, 2 * _P2 * (_P2 - _Q2)) for p in (_P, -_P))),
    *((1 / n, q / n, q * q / n) for q, n in ((q, 2 * _Q2 * (_Q2 - _P2)) for q in (_Q, -_Q))),
    (0, 0, 1),
)
_A = tuple((0.0**i, _P**i, (-_P) ** i, _Q**i, (-_Q) ** i, float(i == TILE - 1)) for i in range(TILE))

Prepare = Callable[[Tensor], Tensor]
"""What becomes of rows of a map before they are convolved."""


def pays(conv: nn.Conv3d, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `convolve` is for a layer and a slice (T, I, h, w), and faster: as measured on a CPU, and there alone.

    Its derivative would need what it does not keep.
    """
    frames, _, h, w = shape
    plain = (conv.stride, conv.dilation, conv.padding) == ((1, 1, 1), (1, 1, 1), (0, 1, 1))
    if not plain or conv.kernel_size[1:] != (3, 3) or conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    large = frames * h * w >= LEAST_POSITIONS and conv.in_channels >= LEAST_IN and conv.out_channels >= LEAST_OUT
    return large and device.type == "cpu" and dtype == torch.float32 and not torch.is_grad_enabled()


def squared(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """The Kronecker square of one of the matrices, as a tensor like another."""
    single = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(single, single).to(like)


def transformed(weight: Tensor) -> Tensor:
    """Weights (O, I, t, 3, 3) as kernels (36, t I, O)."""
    c_out, c_in, taps = weight.shape[:3]
    numbers = weight.permute(3, 4, 2, 1, 0).reshape(9, -1).double()  # rounded once, at the end
    return (squared(_G, numbers) @ numbers).to(weight.dtype).view(POINTS, taps * c_in, c_out)


def convolve(history: Tensor | None, x: Tensor, conv: nn.Conv3d, prepare: Prepare) -> tuple[Tensor, Tensor]:
    """The convolution of the frames x (T, I, h, w), prepared, after those of `history` (t - 1, I, h, w).

    Returns (T, O, h, w) and the last t - 1 frames prepared. Without a history frames of zeros stand there. The kernel
    is of t x 3 x 3, of stride 1, and padded by 1.
    """
    before, (frames, _, h, w) = conv.weight.shape[2] - 1, x.shape
    c_out = conv.out_channels
    taps = 1 if history is None and frames == 1 else before + 1
    tall, wide = -(-h // TILE), -(-w // TILE)
    out = x.new_empty((frames, tall, TILE, wide, TILE, c_out))
    left = torch.empty_like(x[:1], memory_format=torch.channels_last).repeat(before, 1, 1, 1)
    parts = -(-POINTS * taps * conv.in_channels * c_out // KERNELS)
    width = -(-c_out // parts)
    for start in range(0, c_out, width):
        chosen = slice(start, start + width)
        bias = None if conv.bias is None else conv.bias[chosen]
        kernels = transformed(conv.weight[chosen, :, before + 1 - taps :])
        _convolve(history, x, kernels, bias, prepare, taps, out[..., chosen], left)
    map_ = out.view(frames, tall * TILE, wide * TILE, c_out)[:, :h, :w].permute(0, 3, 1, 2)
    return map_.contiguous(memory_format=torch.channels_last), left


def _convolve(
    history: Tensor | None,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    prepare: Prepare,
    taps: int,
    out: Tensor,
    left: Tensor,
) -> None:
    """`convolve` with some of the outputs: fills `out` (T, rows, 4, columns, 4, O) and `left`."""
    before, (frames, c, h, w) = len(left), x.shape
    _, tall, _, wide, _, c_out = out.shape
    seen = taps - 1 + frames  # the last ones of all that there are
    into, back = squared(_B, x), squared(_A, x)
    height = max(1, min(tall, STRIP // (TILE * (before + frames) * (TILE * wide + 2) * c)))  # of a strip, in tiles
    strip = x.new_zeros((before + frames, TILE * height + 2, TILE * wide + 2, c))
    tiles = strip[-seen:].unfold(1, SIDE, TILE).unfold(2, SIDE, TILE).permute(4, 5, 1, 2, 0, 3)
    across = min(wide, TILES)
    down = max(1, TILES // across)
    products = x.new_empty((frames, POINTS, down * across * c_out))
    for top in range(0, tall, height):
        first, last = max(0, TILE * top - 1), min(h, TILE * (top + height) + 1)
        start = first - TILE * top + 1
        rows = strip[:, start : start + last - first, 1 : 1 + w].permute(0, 3, 1, 2)
        if history is not None:
            rows[:before] = history[:, :, first:last]
        rows[before:] = prepare(x[:, :, first:last])
        left[:, :, first:last] = rows[frames:]
        strip[:, start + last - first :] = 0
        for i in range(0, min(height, tall - top), down):
            for j in range(0, wide, across):
                tile = tiles[:, :, i : min(i + down, tall - top), j : j + across]
                count = tile.shape[2] * tile.shape[3]
                seeing = (into @ tile.reshape(POINTS, -1)).view(POINTS, count, seen * c)
                made = products[:, :, : count * c_out]
                for frame in range(frames):
                    torch.bmm(
                        seeing[..., frame * c : (frame + taps) * c], kernels, out=made[frame].view(POINTS, count, c_out)
                    )
                picture = (back @ made).view(frames, TILE, TILE, *tile.shape[2:4], c_out)
                if bias is not None:
                    picture += bias
                place = out[:, top + i : top + i + tile.shape[2], :, j : j + tile.shape[3]]
                place.copy_(picture.permute(0, 3, 1, 4, 2, 5))
                if x.is_meta:
                    return  # the others take no other memory
