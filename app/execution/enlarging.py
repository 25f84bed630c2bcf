"""Knows that a 3x3 convolution of a map doubled by nearest neighbour is four 2x2 convolutions of the map itself.

Of the three rows that a kernel covers, two are copies of one row of x, so their weights may be added beforehand: an
output row 2i sees rows i-1 (the kernel's first row) and i (the other two), 2i+1 sees i (the first two) and i+1. The
same holds for columns. The same sums in another order, with 4/9 of the multiplications and a quarter of the window.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_KERNEL_ROWS = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))  # [parity of the output row][row of 2x2]


def merged(weight: Tensor) -> list[Tensor]:
    """Weights (O, I, 3, 3) as two kernels (2 O, I, 2, 2), for even and odd rows; even columns come before odd ones."""
    out, c_in = weight.shape[:2]
    kernels = []
    for rows in _KERNEL_ROWS:
        kernel = weight.new_empty((2, out, c_in, 2, 2))
        for parity, columns in enumerate(_KERNEL_ROWS):
            for i, row in enumerate(rows):
                for j, column in enumerate(columns):
                    kernel[parity, :, :, i, j] = weight[:, :, row, column].float().sum(dim=(2, 3))
        kernels.append(kernel.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return kernels


def enlarge(
    window: Tensor, kernels: list[Tensor], bias: Tensor | None, odd: int, rows: int, sides: bool = False
) -> Tensor:
    """The convolution of x (B, I, n, w) doubled, as (B, O, rows, 2 w).

    `window` holds rows of x, (B, I, n, w), from the one above that which the first output row lies in; `odd` is 1
    where that output row is the lower of its two. With `sides` it has a column of padding on each side too, which are
    zeros otherwise.
    """
    width = window.shape[3] - (2 if sides else 0)
    c_out = kernels[0].shape[0] // 2
    out = torch.empty(
        (window.shape[0], c_out, rows, 2 * width),
        dtype=window.dtype,
        device=window.device,
        memory_format=torch.channels_last,
    )
    twice = None if bias is None else bias.repeat(2)
    for parity in (0, 1):
        first = (parity - odd) % 2  # of the output rows of this parity
        if first >= rows:
            continue
        count = (rows - first + 1) // 2
        above = (odd + first) // 2 + parity  # the window's row that the first of them begins to see
        both = F.conv2d(window[:, :, above : above + count + 1], kernels[parity], twice, padding=(0, 0 if sides else 1))
        for column in (0, 1):
            out[:, :, first::2, column::2] = both[:, column * c_out : (column + 1) * c_out, :, column : column + width]
        del both
    return out


def enlarged(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, padded by one row and column of zeros, of a whole map x (B, I, h, w) doubled: (B, O, 2h, 2w)."""
    return enlarge(F.pad(x, (0, 0, 1, 1)), merged(weight), bias, 0, 2 * x.shape[2])
