"""The functions of maps that see no neighbours: a row of theirs needs one row of the sources, or two that become one.

Channels are moved between space and depth, repeated, averaged, gated, joined. Linear attention is one of them once its
sums over all positions are known, as a GroupNorm is once its statistics are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int, int, int]
"""(B, C, H, W)."""

FACTOR = 2  # rows and columns of a block that is one position with more channels
CHUNK = 1 << 20  # numbers that linear attention has in float32 at once, its results not counted
TINY = 1e-15  # added to a divisor: SanaMultiscaleLinearAttention of diffusers, eps


class Totals(ABC):
    """What a global function sums over all positions of a map, band by band."""

    @abstractmethod
    def add(self, band: Tensor) -> None:
        """Takes in a band (B, C, rows, W)."""


class Pointwise(ABC):
    """A function of maps (B, C, H, W) of one height. Its result is a tensor of its own, channels_last."""

    enlarges = 1  # output rows per row of the sources
    reduces = 1  # rows of the sources per output row

    @abstractmethod
    def shape(self, *sources: Shape) -> Shape:
        """The result's. Raises ValueError for sources that do not fit."""

    @abstractmethod
    def __call__(self, *sources: Tensor) -> Tensor:
        """The result; the sources stay as they are."""

    @property
    def later(self) -> "Pointwise":
        """What it is for the frames of a clip that come after its first slice."""
        return self

    def scratch(self, source: int) -> int:
        """Numbers needed meanwhile beside the result, where the first source has so many."""
        return 0

    def flops(self, source: int) -> int:
        """Multiplications and additions, where they are not few."""
        return 0

    def reads(self, stop: int) -> int:
        """Rows of the sources that the output rows < stop need."""
        return -(-stop // self.enlarges) * self.reduces

    def leaves(self, stop: int) -> int:
        """The first row of the sources that the output rows >= stop need."""
        return stop // self.enlarges * self.reduces


class GlobalPointwise(Pointwise):
    """One that needs totals of its only source first."""

    def __call__(self, *sources: Tensor) -> Tensor:
        """Of a source that is the whole map."""
        (x,) = sources
        totals = self.totals()
        totals.add(x)
        return self.applied(x, totals)

    @abstractmethod
    def applied(self, x: Tensor, totals: Totals) -> Tensor:
        """The result for rows x of a map with these totals."""

    @abstractmethod
    def totals(self) -> Totals:
        """Empty ones."""

    @abstractmethod
    def totalled(self, source: Shape) -> int:
        """Numbers in the totals of such a map."""


def _last(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C), a view."""
    return x.permute(0, 2, 3, 1)


def _first(x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, C, h, w), channels_last."""
    return x.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ToSpace(Pointwise):
    """Each channel `repeat` times over, then four channels to a block of 2x2 positions.

    The four stand side by side as in `F.pixel_shuffle`; with `blocks_first` they are a quarter of all channels apart,
    as HunyuanImage has them. Within a block: rows, then columns.
    """

    repeat: int = 1
    blocks_first: bool = False
    enlarges = FACTOR

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        if c * self.repeat % FACTOR**2:
            raise ValueError(f"{c} channels, {self.repeat} times each, are no blocks of {FACTOR**2}")
        return b, c * self.repeat // FACTOR**2, FACTOR * h, FACTOR * w

    def __call__(self, *sources: Tensor) -> Tensor:
        (x,) = sources
        b, c, h, w = x.shape
        out = c * self.repeat // FACTOR**2
        many = _last(x).unsqueeze(-1).expand(b, h, w, c, self.repeat)
        if self.blocks_first:
            blocks = many.reshape(b, h, w, FACTOR, FACTOR, out).permute(0, 1, 3, 2, 4, 5)
        else:
            blocks = many.reshape(b, h, w, out, FACTOR, FACTOR).permute(0, 1, 4, 2, 5, 3)
        return _first(blocks.reshape(b, FACTOR * h, FACTOR * w, out))


@dataclass(frozen=True)
class ToChannels(Pointwise):
    """The reverse: blocks of 2x2 positions to channels, then the mean of every `average` consecutive channels."""

    average: int = 1
    blocks_first: bool = False
    reduces = FACTOR

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        if h % FACTOR or w % FACTOR or c * FACTOR**2 % self.average:
            raise ValueError(f"{c} channels of {h}x{w} positions are no means of {self.average} of 2x2 blocks")
        return b, c * FACTOR**2 // self.average, h // FACTOR, w // FACTOR

    def __call__(self, *sources: Tensor) -> Tensor:
        (x,) = sources
        b, c, h, w = self.shape(tuple(sources[0].shape))  # type: ignore[arg-type]
        blocks = _last(x).reshape(b, h, FACTOR, w, FACTOR, x.shape[1])
        order = (0, 1, 3, 2, 4, 5) if self.blocks_first else (0, 1, 3, 5, 2, 4)
        groups = blocks.permute(order).reshape(b, h, w, c, self.average)
        return _first(groups.mean(dim=-1) if self.average > 1 else groups.reshape(b, h, w, c))

    def scratch(self, source: int) -> int:
        return source if self.average > 1 else 0


@dataclass(frozen=True)
class Repeat(Pointwise):
    """Each channel `times` times, side by side."""

    times: int

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        return b, c * self.times, h, w

    def __call__(self, *sources: Tensor) -> Tensor:
        (x,) = sources
        return _first(_last(x).repeat_interleave(self.times, dim=-1))


@dataclass(frozen=True)
class Average(Pointwise):
    """The mean of every `of` consecutive channels."""

    of: int

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        if c % self.of:
            raise ValueError(f"{c} channels are no groups of {self.of}")
        return b, c // self.of, h, w

    def __call__(self, *sources: Tensor) -> Tensor:
        (x,) = sources
        return _first(_last(x).unflatten(-1, (-1, self.of)).mean(dim=-1))


@dataclass(frozen=True)
class Join(Pointwise):
    """The sources' channels, one source after the other."""

    def shape(self, *sources: Shape) -> Shape:
        b, _, h, w = sources[0]
        return b, sum(source[1] for source in sources), h, w

    def __call__(self, *sources: Tensor) -> Tensor:
        return _first(torch.cat([_last(x) for x in sources], dim=-1))


@dataclass(frozen=True)
class Gate(Pointwise):
    """The first half of the channels, times silu of the second."""

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        if c % 2:
            raise ValueError(f"{c} channels have no halves")
        return b, c // 2, h, w

    def __call__(self, *sources: Tensor) -> Tensor:
        value, gate = _last(sources[0]).chunk(2, dim=-1)
        return _first(F.silu(gate).contiguous().mul_(value))


@dataclass(frozen=True, eq=False)
class Add(Pointwise):
    """norm(first) + second, the norm a pointwise one; first + second without."""

    norm: nn.Module | None = None

    def shape(self, *sources: Shape) -> Shape:
        first, second = sources
        if first != second:
            raise ValueError(f"maps of {first} and {second} cannot be added")
        return first

    def __call__(self, *sources: Tensor) -> Tensor:
        x, other = sources
        if self.norm is None:
            return torch.add(x, other, out=torch.empty_like(x, memory_format=torch.channels_last))
        out: Tensor = self.norm(x)
        return out.add_(other)


@dataclass(frozen=True)
class LinearAttention(GlobalPointwise):
    """Attention with the kernel relu(q) relu(k), each group of 3 * `width` channels q, k and v of a head of its own.

    Of n positions it costs n, not n^2: out = [v k^T] q / ([1 k^T] q), where the brackets are sums over all positions,
    in float32 whatever the map has. Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236; Cai et al.,
    "EfficientViT", arXiv:2205.14756; DC-AE, arXiv:2410.10733.
    """

    width: int

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        if c % (3 * self.width):
            raise ValueError(f"{c} channels are no heads of {3 * self.width}")
        return b, c // 3, h, w

    def totals(self) -> "KeyValues":
        return KeyValues(self.width)

    def totalled(self, source: Shape) -> int:
        return source[0] * source[1] // 3 * (self.width + 1)

    def scratch(self, source: int) -> int:
        # Of a chunk k and v, or q and what it makes; in half precision float32 counts twice.
        return min(source, CHUNK) * 2 // 3 * 2

    def flops(self, source: int) -> int:
        return 4 * source // 3 * (self.width + 1)

    def applied(self, x: Tensor, totals: Totals) -> Tensor:
        assert isinstance(totals, KeyValues)
        b, c, _, w = x.shape
        out = x.new_empty((b, x.shape[2], w, c // 3))
        for row, part in _chunks(x):
            (query,) = _heads(part, self.width, slice(0, 1))
            query.relu_()
            made = query @ totals.products  # (B, heads, positions, width + 1)
            made = made[..., :-1].div_(made[..., -1:] + TINY)
            rows = part.shape[2]
            out[:, row : row + rows] = made.transpose(1, 2).reshape(b, rows, w, c // 3)
        return _first(out)


class KeyValues(Totals):
    """The sum over positions of k [v, 1]^T, per item and head: (B, heads, width, width + 1) in float32."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.products = torch.empty(0)

    def add(self, band: Tensor) -> None:
        for _, part in _chunks(band):
            key, value = _heads(part, self._width, slice(1, 3))
            key = key.relu_().transpose(2, 3)  # (B, heads, width, positions)
            made = torch.cat([key @ value, key.sum(dim=3, keepdim=True)], dim=3)
            self.products = self.products + made if self.products.numel() else made


def _chunks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(row, rows) of x, so many that they are about CHUNK numbers."""
    b, c, h, w = x.shape
    rows = max(1, CHUNK // (b * c * w))
    for row in range(0, h, rows):
        yield row, x[:, :, row : row + rows]


def _heads(x: Tensor, width: int, which: slice) -> Tensor:
    """Those asked for of q, k and v, (n, B, heads, positions, width) in float32 and memory of their own."""
    b, c, h, w = x.shape
    grouped = _last(x).reshape(b, h * w, c // (3 * width), 3, width).permute(3, 0, 2, 1, 4)[which]
    return torch.empty(grouped.shape, dtype=torch.float32, device=x.device).copy_(grouped)
