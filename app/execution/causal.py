"""Knows a causal network's layers in time: what each makes of a slice of a clip, given the frames before it.

The frames of a slice are the batch of its maps, (T, C, h, w). Over channels_last maps they are one channels_last clip
as they lie: nothing is rearranged.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.execution.pointwise import Pointwise, Shape
from app.execution.rows import Rows

Carry = deque[Rows]
"""What the layers in time keep between two slices of a clip, in the order they run; empty before the first slice.

A run takes each from the left and leaves its successor on the right, so that what lies there is never twice in memory.
A run that fails leaves nothing to go on from.
"""


@dataclass(frozen=True)
class Slice:
    """Where in a clip the frames of a run stand. A picture is all of it."""

    first: bool = True
    last: bool = True


WHOLE_CLIP = Slice()


@dataclass(frozen=True, eq=False)
class Kept:
    """What one layer in time has of the slice before this one, and leaves to the next."""

    before: int  # frames
    history: Rows | None  # None: this is the first slice
    left: Rows | None  # None: it is the last

    @property
    def first(self) -> bool:
        """Whether nothing came before."""
        return self.history is None

    def read(self, start: int, stop: int) -> Tensor | None:
        """These rows of the frames before, which are read from the top and once."""
        if self.history is None:
            return None
        rows = self.history.joined(start, stop)
        self.history.trim(stop)  # the bands of the slice before may be higher
        return rows

    def write(self, frames: Tensor) -> None:
        """The rows of the last frames, below those that were written."""
        if self.left is not None:
            self.left.append(frames.clone(memory_format=torch.channels_last))


def carried_bytes(carry: Carry) -> int:
    """Bytes of what lies between two slices."""
    return sum(kept.nbytes for kept in carry)


def history_of(conv: nn.Conv3d) -> int:
    """Frames before a slice that the layer reads."""
    return int(conv.kernel_size[0]) - int(conv.stride[0])


def joined(history: Tensor | None, x: Tensor, before: int) -> Tensor:
    """(before + T, C, h, w): the frames before x, zeros before a clip's first, and x."""
    frames = x.new_zeros((before, *x.shape[1:])) if history is None else history
    return torch.cat((frames, x)).contiguous(memory_format=torch.channels_last)


def causal(frames: Tensor, conv: nn.Conv3d, padding: tuple[int, int], first: bool) -> Tensor:
    """The convolution of frames (before + T, C, h, w), padded by so many rows and columns of zeros: (T, C', h', w').

    Of a clip's first frame alone the last taps do all of it.
    """
    before = history_of(conv)
    if first and len(frames) == before + 1:
        out = F.conv2d(frames[before:], conv.weight[:, :, -1], conv.bias, padding=padding)
    else:
        clip = frames.transpose(0, 1)[None]  # (1, C, T, h, w): channels_last_3d where the frames are channels_last
        out = F.conv3d(clip, conv.weight, conv.bias, conv.stride, (0, *padding))[0].transpose(0, 1)
    return out.contiguous(memory_format=torch.channels_last)


def between(x: Tensor, history: Tensor | None, conv: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """A slice at another rate, and the last frames that the next one reads. A clip's first frame stays as it is.

    With a stride of two, of every two later frames one is made, from them and the one before. With twice as many
    channels out as in, of each later frame two, from it and the two before, zeros in place of the first.
    """
    before, stride = history_of(conv), int(conv.stride[0])
    head, later = (x[:1], x[1:]) if history is None else (x[:0], x)
    start = head if history is None and stride == 2 else history
    if not len(later):
        return head, (x.new_zeros((before, *x.shape[1:])) if start is None else start)
    # A position's frames side by side, (h, w, before + T, C): what makes a frame of them is one product.
    _, c, h, w = x.shape
    series = x.new_zeros((h, w, before + len(later), c))
    if start is not None:
        series[:, :, :before] = start.permute(2, 3, 0, 1)
    series[:, :, before:] = later.permute(2, 3, 0, 1)
    taps, split = int(conv.kernel_size[0]), conv.out_channels // c  # frames that are read, and that are made of them
    weights = conv.weight.flatten(2).transpose(1, 2).flatten(1).split(c)  # each (C, taps * C)
    biases = (None,) * split if conv.bias is None else conv.bias.split(c)
    made = x.new_empty((len(head) + len(later) // stride * split, h, w, c))
    made[: len(head)] = head.permute(0, 2, 3, 1)
    for number, frame in enumerate(made[len(head) :]):
        at, part = stride * (number // split), number % split
        frame.copy_(F.linear(series[:, :, at : at + taps].flatten(2), weights[part], biases[part]))
    return made.permute(0, 3, 1, 2), series[:, :, len(later) :].permute(2, 3, 0, 1)


@dataclass(frozen=True)
class Between(Pointwise):
    """`between` as a layer of a program: rows of its result need the same rows alone."""

    conv: nn.Conv3d
    first: bool
    frames: int  # of its source

    @property
    def before(self) -> int:
        """Frames before a slice that it reads."""
        return history_of(self.conv)

    def shape(self, *sources: Shape) -> Shape:
        ((t, c, h, w),) = sources
        head = 1 if self.first else 0
        later = (t - head) // 2 if self.conv.stride[0] == 2 else 2 * (t - head)
        return head + later, c, h, w

    def __call__(self, *sources: Tensor) -> Tensor:
        """Of a whole clip."""
        return between(sources[0], None, self.conv)[0]

    def scratch(self, source: int) -> int:
        return source + (self.before + 1) * source // self.frames  # with the frames before it, and a product

    def flops(self, source: int) -> int:
        return 2 * source * int(self.conv.kernel_size[0]) * self.conv.out_channels // int(self.conv.stride[0])
