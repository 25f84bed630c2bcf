"""Knows how one pass runs: feature maps as bands of rows, pulled from target to source, no row computed twice.

A band is a contiguous channels_last tensor (B, C, rows, W). A convolution reads a window of prepared rows
(normalised, activated; padding only beyond the picture's own edges) and carries the window's last rows over
to the next band, so that there is no overlap between bands and no seam.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.execution.causal import Between, Kept, between, causal
from app.execution.enlarging import enlarge, merged
from app.execution.moments import Moments, Prepare, prepare
from app.execution.passes import Pass
from app.execution.pointwise import GlobalPointwise, Pointwise, Totals
from app.execution.primitive import attend, tokens
from app.execution.program import Conv, Node
from app.execution.rows import Rows
from app.execution.winograd import convolve

Statistics = Moments | Totals
"""What is gathered of a whole map before a global layer reads it."""


def statistics_of(node: Node) -> Callable[[], Statistics]:
    """What makes the empty statistics that a global layer needs of its source."""
    return node.op.totals if isinstance(node.op, GlobalPointwise) else Moments


class Walk:
    """The state of one pass: what its nodes have computed, and how far their readers have read."""

    def __init__(
        self,
        each: Pass,
        maps: dict[Node, Rows],
        statistics: dict[Node, Statistics],
        in_time: Mapping[Node, Kept],
        like: Tensor,
    ) -> None:
        self._kept = maps
        self._in_time = in_time
        self._like = like  # dtype and device of every map
        self._frees = frozenset(each.frees)
        self._rows = {node: Rows() for node in each.nodes if node not in each.targets}
        self._made = dict.fromkeys(each.nodes, 0)  # rows of each node computed so far
        self._carry: dict[Node, Tensor] = {}  # prepared rows that a convolution's next band reads again
        self._merged = {
            node: merged(node.op.conv.weight) for node in each.nodes if isinstance(node.op, Conv) and node.op.up == 2
        }
        self._statistics = statistics
        self._prepare = {node: _prepare(node, statistics) for node in each.nodes if not isinstance(node.op, Pointwise)}
        self._read: dict[Node, dict[tuple[Node, str], int]] = {}  # rows that each reader of a map has done with
        for node in each.nodes:
            for role, source in _roles(node):
                self._read.setdefault(source, {})[node, role] = 0

    def band(self, node: Node, stop: int) -> Tensor:
        """The rows of `node` from where its last band ended to `stop`."""
        op, start = node.op, self._made[node]
        if isinstance(op, Pointwise):
            return self._apply(node, op, stop)
        assert isinstance(op, Conv) and node.x is not None
        self._pull(node.x, op.reads(stop, node.x.shape[2]))
        out = self._bare(node, op, node.x, stop) if op.windowless else self._convolve(node, op, node.x, stop)
        if node.add is not None:
            self._pull(node.add, stop)
            for row, part in self._source(node.add).read(start, stop):
                out[:, :, row - start : row - start + part.shape[2]] += part
                del part  # the loop's name would keep the map's last band alive
            self._release(node.add, (node, "add"), stop)
        self._made[node] = stop
        return out if op.then is None else op.then(out, inplace=True)

    def _pull(self, node: Node, stop: int) -> None:
        """Makes sure that the rows < stop of `node` are there."""
        if node in self._rows and self._made[node] < stop:
            self._rows[node].append(self.band(node, stop))

    def _source(self, node: Node) -> Rows:
        return self._rows[node] if node in self._rows else self._kept[node]

    def _release(self, node: Node, reader: tuple[Node, str], stop: int) -> None:
        """Lets go of the rows that every reader has done with."""
        self._read[node][reader] = stop
        done = min(self._read[node].values())
        if node in self._rows:
            self._rows[node].trim(done)
        elif node in self._frees:
            self._kept[node].free(done)

    def _apply(self, node: Node, op: Pointwise, stop: int) -> Tensor:
        """A pointwise function of the rows of its sources; of one block of output rows perhaps the lower only."""
        start = self._made[node]
        first, last = op.leaves(start), op.reads(stop)
        parts = []
        for source in node.sources:
            self._pull(source, last)
            rows = [part for _, part in self._source(source).read(first, last)]
            parts.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=2))
            del rows
        if isinstance(op, Between):
            out, last_frames = between(parts[0], self._in_time[node].read(first, last), op.conv)
            self._in_time[node].write(last_frames)
            del last_frames
        elif isinstance(op, GlobalPointwise):
            totals = self._statistics[node.sources[0]]
            assert isinstance(totals, Totals)
            out = op.applied(parts[0], totals)
        else:
            out = op(*parts)
        del parts
        for role, source in _roles(node):
            self._release(source, (node, role), op.leaves(stop))
        self._made[node] = stop
        above = start % op.enlarges
        if (above, stop - start) == (0, out.shape[2]):
            return _channels_last(out)
        return out[:, :, above : above + stop - start].clone(memory_format=torch.channels_last)

    def _bare(self, node: Node, op: Conv, x: Node, stop: int) -> Tensor:
        """A 1x1 convolution of the rows where they lie."""
        weight, bias, groups = op.conv.weight, op.conv.bias, op.conv.groups
        parts = [
            F.conv2d(part, weight, bias, groups=groups) for _, part in self._source(x).read(self._made[node], stop)
        ]
        self._release(x, (node, "x"), stop)
        return _channels_last(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))

    def _convolve(self, node: Node, op: Conv, x: Node, stop: int) -> Tensor:
        """A convolution of a window of x, whose rows are numbered as those of x: the padding begins at -top."""
        left, _, top, _ = op.pad
        b, c, height, width = x.shape
        start = self._made[node]
        first = op.stride * (start // op.up) - top
        carry = self._carry.pop(node, None)
        ready = max(first, 0) if carry is None else first + carry.shape[2]
        end = max(ready, op.reads(stop, height))
        sides = op.sides
        window = torch.empty(
            (op.before + b, c, op.below(stop) - first, width + sum(sides)),
            dtype=self._like.dtype,
            device=self._like.device,
            memory_format=torch.channels_last,
        )
        if carry is not None:
            window[:, :, : carry.shape[2]] = carry
        above = 0 if carry is not None else max(0, -first)
        del carry
        inner = window[..., sides[0] : sides[0] + width]
        for row, part in self._source(x).read(ready, end):
            self._prepare[node](part, inner[op.before :, :, row - first : row - first + part.shape[2]])
            del part
        fresh = inner[:, :, ready - first : end - first]
        if op.act is not None:
            op.act(fresh[op.before :], inplace=True)
        if op.before and end > ready:
            _fill(fresh, self._in_time[node], ready)
        _surround(window, above, end - first, height - first, sides, op.replicates)
        self._release(x, (node, "x"), end)
        following = op.stride * (stop // op.up) - top
        if following < first + window.shape[2] and stop < node.shape[2]:
            self._carry[node] = window[:, :, following - first :].clone()
        if op.up == 2:
            return enlarge(window, self._merged[node], op.conv.bias, start % 2, stop - start, any(sides))
        if (kernels := op.kernels(height, width)) is not None:
            return convolve(window, kernels, op.conv.bias, prepare(None, None), above=0)
        padding = (0, 0 if any(sides) else left)
        if isinstance(op.conv, nn.Conv3d):
            return causal(window, op.conv, padding, self._in_time[node].first)
        return _channels_last(
            F.conv2d(window, op.conv.weight, op.conv.bias, op.conv.stride, padding, groups=op.conv.groups)
        )


def _roles(node: Node) -> Iterator[tuple[str, Node]]:
    """(what it is to the node, map) of all that the node is computed from."""
    for role, source in (("x", node.x), ("add", node.add)):
        if source is not None:
            yield role, source
    for i, source in enumerate(node.more):
        yield f"more {i}", source


def _prepare(node: Node, statistics: dict[Node, Statistics]) -> Prepare:
    assert not isinstance(node.op, Pointwise)
    norm = None if node.op is None else node.op.norm
    moments = None if node.normed is None else statistics[node.normed]
    assert moments is None or isinstance(moments, Moments)
    return prepare(norm, moments)


def _surround(window: Tensor, above: int, below: int, height: int, sides: tuple[int, int], replicate: bool) -> None:
    """Fills the padding of a window: rows < `above` and >= `below`, columns on both sides.

    A map of which the window shows rows < `height` goes on as its edge does, or as zeros.
    """
    left, right = sides
    width = window.shape[3] - left - right
    places = (
        (window[:, :, :above], window[:, :, above : above + 1]),
        (window[:, :, below:], window[:, :, height - 1 : height]),
        (window[..., :left], window[..., left : left + 1]),
        (window[..., left + width :], window[..., left + width - 1 : left + width]),
    )
    for place, edge in places:
        if not replicate:
            place.zero_()
        elif place.numel():
            place.copy_(edge)


def _fill(frames: Tensor, kept: Kept, row: int) -> None:
    """The frames before those of a window's rows, which begin at `row`; the last ones are kept."""
    history = kept.read(row, row + frames.shape[2])
    if history is None:
        frames[: kept.before].zero_()
    else:
        frames[: kept.before] = history
    kept.write(frames[len(frames) - kept.before :])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _attention(each: Pass, x: Rows, prepare: Prepare, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(row, band) of x + proj_out(softmax(q k^T / sqrt(C)) v): keys and values whole, queries band by band."""
    (node,) = each.targets
    block = node.op
    assert block is not None and not isinstance(block, Conv | Pointwise)
    b, c, h, w = node.shape
    keys, values = (like.new_empty((b, 1, h * w, c)) for _ in range(2))
    for row, part in x.read(0, h):
        normed = torch.empty_like(part, memory_format=torch.channels_last)
        prepare(part, normed)
        at = slice(row * w, (row + part.shape[2]) * w)
        keys[:, :, at] = tokens(block.k(normed))
        values[:, :, at] = tokens(block.v(normed))
        del part, normed
    for start in range(0, h, each.rows):
        stop = min(h, start + each.rows)
        out = torch.cat([part for _, part in x.read(start, stop)], dim=2)
        if each.frees:
            x.free(stop)
        normed = torch.empty_like(out)
        prepare(out, normed)
        attended = attend(tokens(block.q(normed)), keys, values)
        out += block.proj_out(attended.reshape(b, stop - start, w, c).permute(0, 3, 1, 2))
        del normed, attended
        yield start, out
        del out


def walk(
    each: Pass,
    maps: dict[Node, Rows],
    statistics: dict[Node, Statistics],
    in_time: Mapping[Node, Kept],
    like: Tensor,
) -> Iterator[tuple[Node, int, Tensor]]:
    """Runs one pass: yields (target, first row, band) in order of rows.

    `maps` are the kept maps, whose bands are freed as `each.frees` says; `statistics` what the pass's global
    layers need; `in_time` what its layers in time keep; `like` any tensor of the maps' dtype and device.
    """
    (target, *_) = each.targets
    if target.attends:
        assert target.x is not None
        for start, band in _attention(each, maps[target.x], _prepare(target, statistics), like):
            yield target, start, band
            del band
        return
    state = Walk(each, maps, statistics, in_time, like)
    for start in range(0, target.shape[2], each.rows):
        for target in each.targets:
            yield target, start, state.band(target, min(target.shape[2], start + each.rows))
