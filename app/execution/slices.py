"""Knows how to run a causal network over the frames of one clip, slice by slice, exactly.

The frames of a slice are the batch of its maps, (T, C, h, w): layers in space take them for pictures. A layer in time
carries the last frames that it saw over to the next slice, so that any slices give what the whole clip gives, up to the
order of additions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from app.execution.causal import Carry, between, causal, history_of, joined
from app.execution.causal_winograd import convolve, pays
from app.execution.norms import Norm
from app.execution.pointwise import Pointwise
from app.execution.primitive import Activation, AttentionBlock, Whole
from app.execution.rows import Rows


class Sliced(Whole):
    """The next slice of one clip, on whole maps; a value for one run.

    `check` is called before each layer and cancels the run by raising. Of maps on `meta`, `device` is the one that is
    meant.
    """

    def __init__(
        self, carry: Carry, check: Callable[[], None] = lambda: None, device: torch.device | None = None
    ) -> None:
        self._carry = carry
        self._first = not carry
        self._check = check
        self._device = device

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
        history = self._history()
        if pays(conv, x.shape, x.dtype, self._device or x.device):
            out, left = convolve(history, x, conv, partial(_prepared, norm=norm, act=act))
        else:
            frames = joined(history, _prepared(x, norm, act), history_of(conv))
            left = frames[len(frames) - history_of(conv) :].clone(memory_format=torch.channels_last)
            out = causal(frames, conv, (int(conv.padding[1]), int(conv.padding[2])), self._first)
            del frames
        del history
        self._leave(left)
        if add is not None:
            out += add
        return out if then is None else then(out, inplace=True)

    def attention(self, x: Tensor, block: AttentionBlock) -> Tensor:
        """See `Execution.attention`: of each frame by itself."""
        self._check()
        return super().attention(x, block)

    def apply(self, function: Pointwise, *sources: Tensor) -> Tensor:
        """See `Execution.apply`."""
        return (function if self._first else function.later)(*sources)

    def between(self, x: Tensor, conv: nn.Conv3d) -> Tensor:
        """See `Execution.between`."""
        self._check()
        out, last = between(x, self._history(), conv)
        self._leave(last.clone(memory_format=torch.channels_last))
        return out

    def _history(self) -> Tensor | None:
        if self._first:
            return None
        rows = self._carry.popleft()
        return rows.joined(0, rows.stop)

    def _leave(self, frames: Tensor) -> None:
        self._carry.append(Rows())
        self._carry[-1].append(frames)


def _prepared(x: Tensor, norm: Norm | None, act: Activation | None) -> Tensor:
    if norm is not None:
        x = norm(x)
    return x if act is None else act(x, inplace=norm is not None)
