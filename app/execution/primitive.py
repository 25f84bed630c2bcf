"""The one primitive that every network is written against, and its plain execution.

A network never calls torch layers itself: it asks an `Execution` for norm -> activation -> (up-sampling)
convolution -> residual add, for attention, and for pointwise functions. `Whole` does it in one go on whole feature
maps; `banded.Banded` does it over bands of rows and gives the same picture from a fraction of the memory.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.execution.enlarging import enlarged
from app.execution.moments import Moments, Prepare, prepare
from app.execution.norms import Norm, global_norm
from app.execution.pointwise import Pointwise
from app.execution.winograd import convolve, kernels_of

Activation = Callable[..., Tensor]
"""A pointwise function `act(x, inplace=False)`: `F.silu`, `F.relu`, `tanh_clamp`."""

Pad = tuple[int, int, int, int]
"""Columns and rows around a map: (left, right, top, bottom), the order of `F.pad`."""

PADDINGS = {"zeros": "constant", "replicate": "replicate"}
"""Kinds of padding, as `nn.Conv2d` and as `F.pad` call them."""

SCORE_ELEMENTS = 1 << 26
"""Attention scores held at once where torch has no fused kernel: 256 MiB in float32."""

Map = TypeVar("Map")


class AttentionBlock(Protocol):
    """Single-head self-attention over all positions of a map; q, k, v and proj_out are 1x1 convolutions."""

    q: nn.Conv2d
    k: nn.Conv2d
    v: nn.Conv2d
    proj_out: nn.Conv2d

    @property
    def norm(self) -> Norm:
        """What stands before the three."""


class Execution(Protocol[Map]):
    """How a network runs. `Map` is whatever stands for a feature map (B, C, H, W) in this execution."""

    def conv(
        self,
        x: Map,
        conv: nn.Conv2d,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        up: bool = False,
        pad: Pad | None = None,
        add: Map | None = None,
        then: Activation | None = None,
    ) -> Map:
        """then(conv(up(act(norm(x)))) + add).

        `up` doubles both sides by nearest neighbour; `pad` replaces the convolution's own padding, and is of its kind:
        zeros, or with `padding_mode="replicate"` the map's edge. Raises ValueError for paddings of other kinds.
        """

    def attention(self, x: Map, block: AttentionBlock) -> Map:
        """x + proj_out(softmax(q k^T / sqrt(C)) v) over all H*W positions of norm(x)."""

    def apply(self, function: Pointwise, *sources: Map) -> Map:
        """function(*sources)."""

    def between(self, x: Map, conv: nn.Conv3d) -> Map:
        """A clip's first frame as it is, its later ones through a convolution over time alone; see `causal.between`.

        A picture is a first frame.
        """


Network = Callable[[Any, Any], Any]
"""A network's forward: (execution, input map) -> output map, as `AutoencoderKL.encoder` or `.decoder`."""


def tanh_clamp(x: Tensor, inplace: bool = False) -> Tensor:
    """TAESD's soft limit on latents, tanh(x / 3) * 3 (github.com/madebyollin/taesd, class Clamp)."""
    return (x.div_(3) if inplace else x / 3).tanh_().mul_(3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q (B, 1, n, C) over k, v (B, 1, m, C), without an n x m matrix in memory.

    Where torch would fall back to its quadratic form, the queries go in chunks of `SCORE_ELEMENTS` scores.
    """
    if q.is_meta:  # there torch decomposes the kernel into its quadratic form, which no real device allocates
        return torch.empty_like(q)
    fused: int = torch._fused_sdp_choice(q, k, v)
    if fused:  # 0 is SDPBackend.MATH
        return F.scaled_dot_product_attention(q, k, v)
    rows = max(1, SCORE_ELEMENTS // (q.shape[0] * k.shape[2]))
    chunks = [F.scaled_dot_product_attention(part, k, v) for part in torch.split(q, rows, dim=2)]
    return torch.cat(chunks, dim=2)


def padding_of(conv: nn.Conv2d | nn.Conv3d, pad: Pad | None) -> Pad:
    """What is put around a map before the convolution.

    Raises ValueError for a kind that no execution has.
    """
    if isinstance(conv.padding, str) or conv.padding_mode not in PADDINGS:
        raise ValueError(f"a convolution is padded by numbers, with zeros or its edge: {conv}")
    pad_h, pad_w = (int(side) for side in conv.padding[-2:])
    return pad if pad is not None else (pad_w, pad_w, pad_h, pad_h)


def plain(conv: nn.Conv2d | nn.Conv3d, around: Pad) -> bool:
    """Whether it is a 3x3 kernel at every position of a map in zeros: what `enlarging` and `winograd` are about."""
    usual = (conv.kernel_size, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    return usual and around == (1, 1, 1, 1) and conv.padding_mode == "zeros"


def _prepared(x: Tensor, norm: Norm | None, act: Activation | None) -> Prepare:
    """What makes act(norm(x)) of any rows of x."""
    moments = None
    if global_norm(norm) is not None:
        moments = Moments()
        moments.add(x)
    normed = prepare(norm, moments)

    def write(rows: Tensor, out: Tensor) -> None:
        normed(rows, out)
        if act is not None:
            act(out, inplace=True)

    return write


def _plain(x: Tensor, conv: nn.Conv2d, around: Pad) -> Tensor:
    left, right, top, bottom = around
    own = conv.padding_mode == "zeros" and (left, top) == (right, bottom)  # which the convolution does itself
    if not own:
        x = F.pad(x, around, mode=PADDINGS[conv.padding_mode])
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, (top, left) if own else (0, 0), conv.dilation, conv.groups)


def tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 1, h*w, C); free of copies for channels_last maps."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)


class Whole:
    """Whole feature maps (B, C, H, W), one torch call after the other; what the other executions must equal."""

    def conv(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        up: bool = False,
        pad: Pad | None = None,
        add: Tensor | None = None,
        then: Activation | None = None,
    ) -> Tensor:
        """See `Execution.conv`."""
        if conv.weight.dim() != 4:
            raise ValueError(f"a kernel of two dimensions runs here: {conv}")
        around = padding_of(conv, pad)
        rearranged = not torch.is_grad_enabled() and plain(conv, around)
        if rearranged and not up and (kernels := kernels_of(conv, *x.shape[2:])) is not None:
            x = convolve(x, kernels, conv.bias, _prepared(x, norm, act), above=1, add=add)
            return x if then is None else then(x, inplace=True)
        if norm is not None:
            x = norm(x)
        if act is not None:
            x = act(x)
        if rearranged and up:
            x = enlarged(x, conv.weight, conv.bias)
        else:
            x = _plain(F.interpolate(x, scale_factor=2.0, mode="nearest") if up else x, conv, around)
        if add is not None:
            x += add  # a convolution's backward needs its input, not its output: safe in training too
        return x if then is None else then(x)

    def attention(self, x: Tensor, block: AttentionBlock) -> Tensor:
        """See `Execution.attention`."""
        b, c, h, w = x.shape
        normed = block.norm(x)
        q, k, v = (tokens(project(normed)) for project in (block.q, block.k, block.v))
        del normed
        out = attend(q, k, v).reshape(b, h, w, c).permute(0, 3, 1, 2)  # (B, C, h, w), channels_last
        projected: Tensor = block.proj_out(out)
        return projected.add_(x)

    def apply(self, function: Pointwise, *sources: Tensor) -> Tensor:
        """See `Execution.apply`."""
        return function(*sources)

    def between(self, x: Tensor, conv: nn.Conv3d) -> Tensor:
        """See `Execution.between`."""
        return x
