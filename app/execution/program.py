"""Knows which layers a network runs and on what shapes: its forward recorded as nodes, before a tensor is touched.

The networks are written against `Execution`; `record` gives them an execution that notes each layer instead of
computing it. What is kept in memory, and in which order bands are computed, is then arithmetic on the nodes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from app.execution.causal import WHOLE_CLIP, Between, Slice, history_of
from app.execution.norms import Norm, global_norm
from app.execution.pointwise import GlobalPointwise, Pointwise, Shape
from app.execution.primitive import Activation, AttentionBlock, Network, Pad, padding_of, plain
from app.execution.winograd import kernels_of


@dataclass(frozen=True)
class Conv:
    """then(conv(up(act(norm(x)))) + add), with the padding spelled out."""

    conv: nn.Conv2d | nn.Conv3d
    norm: Norm | None
    act: Activation | None
    up: int  # output rows per row of x before the stride: 2 where a 3x3 convolution sees x enlarged
    pad: Pad  # (left, right, top, bottom)
    then: Activation | None

    @property
    def kernel(self) -> int:
        """Rows of the kernel."""
        return int(self.conv.kernel_size[-2])

    @property
    def before(self) -> int:
        """Frames before a slice that it reads."""
        return history_of(self.conv) if isinstance(self.conv, nn.Conv3d) else 0

    @property
    def stride(self) -> int:
        """Rows of the padded input per row of the output."""
        return int(self.conv.stride[-2])

    @property
    def replicates(self) -> bool:
        """Whether the padding repeats the map's edge; else it is zeros."""
        return self.conv.padding_mode == "replicate"

    @property
    def sides(self) -> tuple[int, int]:
        """Columns left and right that a window has; none where the convolution itself pads, with as many on each."""
        left, right = self.pad[:2]
        return (0, 0) if left == right and not self.replicates else (left, right)

    def kernels(self, height: int, width: int) -> Tensor | None:
        """Winograd's kernels, where it has some for a map x of height x width."""
        return kernels_of(self.conv, height, width) if self.up == 1 and plain(self.conv, self.pad) else None

    @property
    def windowless(self) -> bool:
        """Whether the rows of x can be convolved where they lie: a bare 1x1."""
        bare = self.norm is None and self.act is None and self.up == 1 and not any(self.pad)
        return bare and tuple(self.conv.kernel_size) == (1, 1) and tuple(self.conv.stride) == (1, 1)

    def below(self, stop: int) -> int:
        """The row of x above which the output rows < stop read; beyond the last row where they read padding."""
        return self.stride * (-(-stop // self.up) - 1) - self.pad[2] + self.kernel

    def reads(self, stop: int, height: int) -> int:
        """Rows of x, which has `height`, that the output rows < stop need."""
        return min(height, self.below(stop))


@dataclass(frozen=True, eq=False)
class Node:
    """One feature map and how it is made: the layer `op` of `x`, plus `add`. The input has neither.

    A pointwise function may have more sources than x.
    """

    shape: Shape
    op: Conv | AttentionBlock | Pointwise | None = None
    x: "Node | None" = None
    add: "Node | None" = None
    more: tuple["Node", ...] = ()

    @property
    def sources(self) -> tuple["Node", ...]:
        """The maps that this one is computed from."""
        return tuple(source for source in (self.x, self.add, *self.more) if source is not None)

    @property
    def normed(self) -> "Node | None":
        """The map whose statistics must be known before the first row can be computed: what a global layer reads."""
        if isinstance(self.op, Pointwise):
            return self.x if isinstance(self.op, GlobalPointwise) else None
        return None if self.op is None or global_norm(self.op.norm) is None else self.x

    @property
    def before(self) -> int:
        """Frames before a slice that it reads."""
        return self.op.before if isinstance(self.op, Conv | Between) else 0

    @property
    def attends(self) -> bool:
        """Whether every row needs all rows of x."""
        return self.op is not None and not isinstance(self.op, Conv | Pointwise)

    @cached_property
    def elements(self) -> int:
        """Numbers in the whole map."""
        b, c, h, w = self.shape
        return b * c * h * w

    @cached_property
    def banded_flops(self) -> int:
        """`flops` as bands compute the map; see `enlarging`."""
        return self.flops * 4 // 9 if isinstance(self.op, Conv) and self.op.up == 2 else self.flops

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of the whole map: convolutions and attention, of either kind."""
        b, c, h, w = self.shape
        if isinstance(self.op, Conv):
            taps = math.prod(self.op.conv.kernel_size)
            return 2 * self.elements * taps * self.op.conv.in_channels // self.op.conv.groups
        if isinstance(self.op, Pointwise):
            return 0 if self.x is None else self.op.flops(self.x.elements)
        return 4 * b * c * (h * w) * (h * w + 2 * c) if self.attends else 0


@dataclass(frozen=True, eq=False)
class Program:
    """The nodes that the output depends on, from the input to the output, each after its sources."""

    nodes: tuple[Node, ...]
    readers: dict[Node, tuple[Node, ...]]
    place: Slice = WHOLE_CLIP

    @property
    def input(self) -> Node:
        """The map that the caller gives."""
        return self.nodes[0]

    @property
    def output(self) -> Node:
        """The map that the caller gets."""
        return self.nodes[-1]

    @cached_property
    def flops(self) -> int:
        """The work of the network as it is written, enlarged maps convolved as such."""
        return sum(node.flops for node in self.nodes)

    @cached_property
    def statistics(self) -> int:
        """Numbers that all global layers keep: of a norm mean and squared distances, scale and shift, per channel."""
        kept = {
            source: node.op.totalled(source.shape)
            if isinstance(node.op, GlobalPointwise)
            else 4 * source.shape[0] * source.shape[1]
            for node in self.nodes
            if (source := node.normed) is not None
        }
        return sum(kept.values())

    @property
    def in_time(self) -> tuple[Node, ...]:
        """The nodes that read frames before a slice, in the network's order."""
        return tuple(node for node in self.nodes if node.before)

    @cached_property
    def carried(self) -> int:
        """Numbers that layers in time keep from slice to slice; of a clip that is one slice, none."""
        if self.place == WHOLE_CLIP:
            return 0
        maps = ((node.before, node.x.shape) for node in self.in_time if node.x is not None)
        return sum(before * c * h * w for before, (_, c, h, w) in maps)

    def cuts(self) -> tuple[Node, ...]:
        """The nodes at which no other map is live: input, block outputs, resampling layers, output."""
        place = {node: i for i, node in enumerate(self.nodes)}
        live = 0  # the last node that reads any map before this one
        cuts = []
        for i, node in enumerate(self.nodes):
            if live <= i:
                cuts.append(node)
            live = max([live, *(place[reader] for reader in self.readers[node])])
        return tuple(cuts)


def inside(targets: Iterable[Node], known: Iterable[Node]) -> tuple[Node, ...]:
    """`targets` and the nodes between them and the `known` ones, each after its sources."""
    found: dict[Node, None] = {}
    stop = frozenset(known)

    def visit(node: Node) -> None:
        if node not in stop and node not in found:
            for source in node.sources:
                visit(source)
            found[node] = None

    for target in targets:
        visit(target)
    return tuple(found)


@dataclass
class _Recorder:
    """An `Execution` whose maps are nodes."""

    place: Slice
    nodes: list[Node] = field(default_factory=list)

    def conv(
        self,
        x: Node,
        conv: nn.Conv2d | nn.Conv3d,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        up: bool = False,
        pad: Pad | None = None,
        add: Node | None = None,
        then: Activation | None = None,
    ) -> Node:
        if set(conv.dilation) != {1}:
            raise ValueError(f"bands need a convolution without dilation: {conv}")
        left, right, top, bottom = padding_of(conv, pad)
        (kernel_h, kernel_w), (stride_h, stride_w) = conv.kernel_size[-2:], conv.stride[-2:]
        if conv.padding_mode == "replicate" and max(top, bottom) >= kernel_h:
            raise ValueError(f"bands need a kernel that reads more than repeated rows: {conv}")
        plain = (conv.kernel_size, conv.stride, conv.groups) == ((3, 3), (1, 1), 1)
        if up and not (plain and (left, right, top, bottom) == (1, 1, 1, 1)):
            raise ValueError(f"bands enlarge before a 3x3 convolution padded by 1 only: {conv}")
        scale = 2 if up else 1
        b, _, h, w = x.shape
        height = (h * scale + top + bottom - kernel_h) // stride_h + 1
        width = (w * scale + left + right - kernel_w) // stride_w + 1
        if height < 1 or width < 1 or kernel_h < stride_h:
            raise ValueError(f"a map of {h}x{w} is too small for {conv}, or its stride skips rows")
        op = Conv(conv, norm, act, scale, (left, right, top, bottom), then)
        return self._add(Node((b, conv.out_channels, height, width), op, x, add))

    def attention(self, x: Node, block: AttentionBlock) -> Node:
        return self._add(Node(x.shape, block, x))

    def apply(self, function: Pointwise, *sources: Node) -> Node:
        x, *more = sources
        function = function if self.place.first else function.later
        return self._add(Node(function.shape(*(source.shape for source in sources)), function, x, more=tuple(more)))

    def between(self, x: Node, conv: nn.Conv3d) -> Node:
        function = Between(conv, self.place.first, x.shape[0])
        return self._add(Node(function.shape(x.shape), function, x))

    def _add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node


def record(network: Network, shape: tuple[int, ...], place: Slice = WHOLE_CLIP) -> Program:
    """The program that `network` runs on an input of `shape` (B, C, H, W), of a network for clips (T, C, H, W).

    Raises ValueError where a layer cannot be run over bands, or a map has no rows or columns left.
    """
    recorder = _Recorder(place)
    b, c, h, w = shape
    start = Node((b, c, h, w))
    output = network(recorder, start)
    nodes = (start, *inside((output,), (start,)))
    readers: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in node.sources:
            readers[source].append(node)
    # In the network's own order: a block's first convolution before its shortcut.
    order = {node: i for i, node in enumerate((start, *recorder.nodes))}
    ordered = tuple(sorted(nodes, key=order.__getitem__))
    return Program(ordered, {node: tuple(found) for node, found in readers.items()}, place)
