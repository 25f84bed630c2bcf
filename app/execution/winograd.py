"""Knows Winograd's F(4x4, 3x3): a 3x3 convolution of stride 1 with 36 multiplications for 4x4 outputs instead of 144.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, at the points 0, 1, -1, 2, -2.
Tiles of 6x6 inputs are multiplied by the Kronecker square of B^T, each of the 36 by the kernels (channels to channels),
and what comes of that by the Kronecker square of A^T: matrix products all three. In float32 alone: the transforms take
differences, for which half precision has no digits to spare.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from app.execution.moments import Prepare

TILE, SIDE = 4, 6  # outputs along one side of a tile, and the inputs that they need
TAPS = SIDE * SIDE
TILES = 128  # multiplied at once, at most: more leave the cache, fewer leave the processor idle
LEAST = 32 * 32  # positions of a map
STRIP = 1 << 20  # prepared numbers at once, about
CONSTANT = 7  # of the 36 what every output of a tile has once, as A^T is 1 at the point 1: where a bias is added

KERNELS = "winograd"
"""The name of the buffer of a layer that has its kernels."""

_B = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
      (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
_G = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
      (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _square(rows: tuple[tuple[float, ...], ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    matrix = torch.tensor(rows, dtype=dtype, device=like.device)
    return torch.kron(matrix, matrix)


def transformed(weight: Tensor) -> Tensor:
    """Weights (O, I, 3, 3) as kernels (36, I, O)."""
    out, c_in = weight.shape[:2]
    taps = weight.permute(2, 3, 1, 0).reshape(9, c_in * out).double()
    return (_square(_G, weight, torch.float64) @ taps).to(weight.dtype).view(TAPS, c_in, out)


def kernels_of(conv: nn.Conv2d | nn.Conv3d, height: int, width: int) -> Tensor | None:
    """The kernels (36, I, O) of a layer that has some, if a map of height x width is worth their reading."""
    kernels = conv._buffers.get(KERNELS)
    if kernels is None or kernels.dtype != torch.float32 or height * width < LEAST:
        return None
    return kernels


@dataclass(frozen=True)
class Grid:
    """How the tiles of a map of height x width outputs are taken: strips of them, and of a strip so many at once."""

    channels: int  # of the inputs
    height: int
    width: int

    @property
    def columns(self) -> int:
        """Tiles side by side."""
        return -(-self.width // TILE)

    @property
    def across(self) -> int:
        """Prepared columns of a strip."""
        return TILE * self.columns + SIDE - TILE

    @property
    def rows(self) -> int:
        """Rows of tiles of a strip."""
        return max(1, min(-(-self.height // TILE), STRIP // (TILE * self.across * self.channels)))

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of tiles that are multiplied at once."""
        columns = -(-self.columns // -(-self.columns // TILES))
        return max(1, min(self.rows, TILES // columns)), columns

    def blocks(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of tiles of a strip that has so many rows of them."""
        high, wide = self.block
        for top in range(0, rows, high):
            for left in range(0, self.columns, wide):
                yield slice(top, min(top + high, rows)), slice(left, min(left + wide, self.columns))


def workspace(items: int, channels: int, out_channels: int, height: int, width: int) -> int:
    """Numbers that `convolve` needs beside its input and its output, for a map of height x width outputs."""
    grid = Grid(channels, height, width)
    high, wide = grid.block
    strip = items * (TILE * grid.rows + SIDE - TILE) * grid.across * channels
    edges = TILE * TILE * high * wide * out_channels if height % TILE or width % TILE else 0
    return strip + 2 * TAPS * high * wide * max(channels, out_channels) + edges


def convolve(
    x: Tensor, kernels: Tensor, bias: Tensor | None, prepare: Prepare, above: int, add: Tensor | None = None
) -> Tensor:
    """The convolution of what `prepare` makes of x (B, I, h, w), plus `add`: (B, O, n, w), channels_last.

    `above` rows of zeros stand above x and as many below: 1 around a whole map, n = h, or 0 where x has the rows around
    the n = h - 2. Columns of zeros stand on both sides.
    """
    b, c, h, w = x.shape
    height, c_out = h - 2 + 2 * above, kernels.shape[2]
    grid = Grid(c, height, w)
    into, out_of = (_square(matrix, x, x.dtype) for matrix in (_B, _A))
    out = x.new_empty((b, height, w, c_out)).permute(0, 3, 1, 2)
    strip = x.new_zeros((b, TILE * grid.rows + SIDE - TILE, grid.across, c))
    high, wide = grid.block
    buffers = x.new_empty((2, TAPS * high * wide * max(c, c_out)))
    for top in range(0, height, TILE * grid.rows):
        first, rows = top - above, min(grid.rows, -(-(height - top) // TILE))
        start, stop = max(first, 0), min(first + TILE * rows + SIDE - TILE, h)
        strip[:, : start - first].zero_()
        strip[:, stop - first :].zero_()
        prepare(x[:, :, start:stop], strip[:, start - first : stop - first, 1 : 1 + w].permute(0, 3, 1, 2))
        for item, (down, right) in product(range(b), grid.blocks(rows)):
            high, wide = down.stop - down.start, right.stop - right.start
            seen = _tiles(strip[item, TILE * down.start :, TILE * right.start :], SIDE, high, wide)
            made = _multiplied(seen, kernels, bias, (into, out_of), buffers)
            place = (
                slice(top + TILE * down.start, top + TILE * down.stop),
                slice(TILE * right.start, TILE * right.stop),
            )
            _write(made, out[item], place, None if add is None else add[item])
        if x.is_meta:
            break  # the others take no other memory
    return out


def _multiplied(
    seen: Tensor, kernels: Tensor, bias: Tensor | None, matrices: tuple[Tensor, Tensor], buffers: Tensor
) -> Tensor:
    """Tiles (6, 6, high, wide, I) of inputs to tiles (4, 4, high, wide, O) of outputs, which lie in the buffers."""
    *_, high, wide, c = seen.shape
    c_out, count = kernels.shape[2], high * wide
    into, out_of = matrices
    gathered, changed = (buffer[: TAPS * count * c].view(TAPS, count, c) for buffer in buffers)
    gathered.view(seen.shape).copy_(seen)
    torch.mm(into, gathered.flatten(1), out=changed.flatten(1))
    products = buffers[0, : TAPS * count * c_out].view(TAPS, count, c_out)
    torch.bmm(changed, kernels, out=products)
    if bias is not None:
        products[CONSTANT] += bias
    made = buffers[1, : TILE * TILE * count * c_out].view(TILE * TILE, count * c_out)
    torch.mm(out_of, products.flatten(1), out=made)
    return made.view(TILE, TILE, high, wide, c_out)


def _tiles(rows: Tensor, side: int, high: int, wide: int) -> Tensor:
    """(n, w, C) -> (side, side, high, wide, C), a view: tiles of side x side positions, TILE apart."""
    down, right, channel = rows.stride()
    strides = (down, right, TILE * down, TILE * right, channel)
    return rows.as_strided((side, side, high, wide, rows.shape[2]), strides, rows.storage_offset())


def _write(made: Tensor, out: Tensor, place: tuple[slice, slice], add: Tensor | None) -> None:
    """Writes tiles (4, 4, high, wide, O) into a place of out (O, n, w), of which the last may lie beyond the edge."""
    high, wide = made.shape[2:4]
    target = out[:, *place].permute(1, 2, 0)  # (rows, columns, O)
    source = None if add is None else add[:, *place].permute(1, 2, 0)
    if target.shape[:2] == (TILE * high, TILE * wide):
        target = _tiles(target, TILE, high, wide)
        source = None if source is None else _tiles(source, TILE, high, wide)
    else:
        rows, columns = target.shape[:2]
        made = made.permute(2, 0, 3, 1, 4).reshape(TILE * high, TILE * wide, -1)[:rows, :columns]
    if source is None:
        target.copy_(made)
    else:
        torch.add(made, source, out=target)
