"""Knows how to run a causal network over the frames of one clip, slice by slice, exactly.

The frames of a slice are the batch of its maps, (T, C, h, w): layers in space take them for pictures. A layer in time
carries the last frames that it saw over to the next slice, so that any slices give what the whole clip gives, up to the
order of additions. Over channels_last maps the T frames are one channels_last clip as they lie: nothing is rearranged.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.execution.norms import Norm
from app.execution.primitive import Activation, AttentionBlock, Whole

Carry = deque[Tensor]
"""What the layers in time keep between two slices of a clip, in the order they run; empty before the first slice.

A run takes each from the left as it comes to its layer and leaves its successor on the right, so that what lies there
is never twice in memory. A run that fails leaves nothing to go on from.
"""


def carried_bytes(carry: Carry) -> int:
    """Bytes of what lies between two slices."""
    return sum(kept.nbytes for kept in carry)


class Sliced(Whole):
    """The next slice of one clip, on whole maps; a value for one run.

    `check` is called before each layer and cancels the run by raising.
    """

    def __init__(self, carry: Carry, check: Callable[[], None] = lambda: None) -> None:
        self._carry = carry
        self._first = not carry
        self._check = check

    def conv(
        self,
        x: Tensor,
        conv: nn.Conv2d | nn.Conv3d,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        add: Tensor | None = None,
        then: Activation | None = None,
        **how: Any,
    ) -> Tensor:
        """See `Execution.conv`; a kernel with taps in time sees the frames before each frame, zeros before the first.

        Such a one is not enlarged, and padded by itself.
        """
        self._check()
        if not isinstance(conv, nn.Conv3d):
            return super().conv(x, conv, norm=norm, act=act, add=add, then=then, **how)
        if norm is not None:
            x = norm(x)
        if act is not None:
            x = act(x, inplace=norm is not None)
        before = conv.kernel_size[0] - 1
        if self._first and len(x) == 1:  # a picture: the last tap, and what it would carry
            x = self._joined(x, before)
            out = F.conv2d(x[before:], conv.weight[:, :, -1], conv.bias, padding=conv.padding[1:])
        else:
            out = _over_time(self._joined(x, before), conv)
        del x
        if add is not None:
            out += add
        return out if then is None else then(out, inplace=True)

    def attention(self, x: Tensor, block: AttentionBlock) -> Tensor:
        """See `Execution.attention`: of each frame by itself."""
        self._check()
        return super().attention(x, block)

    def between(self, x: Tensor, conv: nn.Conv3d) -> Tensor:
        """See `Execution.between`.

        With a stride of two, of every two later frames one is made, from them and the one before. With twice as many
        channels out as in, of each later frame two, from it and the two before, zeros in place of the first.
        """
        self._check()
        head, later = (x[:1], x[1:]) if self._first else (x[:0], x)
        if conv.stride[0] == 2:
            x = torch.cat((head if self._first else self._carry.popleft(), later))
            self._carry.append(x[-1:].clone(memory_format=torch.channels_last))
            made = _over_time(x, conv) if len(later) else later
        else:
            x = self._joined(later, conv.kernel_size[0] - 1)
            if not len(later):
                return head
            pairs = _over_time(x, conv).unflatten(1, (2, -1))  # (T, 2, C, h, w)
            made = pairs.permute(0, 1, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)  # channels_last
        return torch.cat((head, made)) if len(head) else made

    def _joined(self, x: Tensor, before: int) -> Tensor:
        """The frames before x, zeros before the first, and x; the last ones are carried."""
        history = x.new_zeros((before, *x.shape[1:])) if self._first else self._carry.popleft()
        joined = torch.cat((history, x)).contiguous(memory_format=torch.channels_last)
        self._carry.append(joined[len(joined) - before :].clone(memory_format=torch.channels_last))
        return joined


def _over_time(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """Frames (T, C, h, w), those before them included -> (T', C', h', w')."""
    clip = x.transpose(0, 1)[None]  # (1, C, T, h, w): channels_last_3d where the frames are channels_last
    out = F.conv3d(clip, conv.weight, conv.bias, conv.stride, conv.padding)[0].transpose(0, 1)
    return out.contiguous(memory_format=torch.channels_last)
