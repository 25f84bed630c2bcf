"""Knows the memory of passes by arithmetic: what is kept while it grows or shrinks, and what one band needs.

Everything is counted in numbers, not bytes, so that one forecast serves every precision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.execution.passes import Pass, band_rows
from app.execution.pointwise import Pointwise
from app.execution.program import Conv, Node, Program
from app.execution.winograd import workspace

SMALL = 1 << 11  # what statistics are made with: a few numbers per channel


@dataclass(frozen=True)
class WorkingSet:
    """Numbers alive in the bands of a pass, beside the kept maps."""

    first: int  # while it prepares and computes its first band
    later: int  # in any other band; 0 where there is none


def whole_elements(program: Program) -> int:
    """Numbers alive at once in `Whole`: a layer's norm and activation each make a map of their own."""
    last_read = {source: node for node in program.nodes for source in node.sources}
    live: dict[Node, int] = {}
    peak = 0
    for node in program.nodes:
        prepared = 0
        if isinstance(node.op, Conv) and node.x is not None:
            copies = [node.op.norm is not None, node.op.act is not None].count(True)
            if node.op.up == 2:  # the last copy, its padding, the output, and one parity of its rows
                prepared = node.x.elements * (1 + min(copies, 1)) + node.elements + node.elements // 2
            else:
                prepared = node.x.elements * copies
                prepared = max(prepared, prepared // max(copies, 1) + node.elements)
        elif isinstance(node.op, Pointwise) and node.x is not None:
            prepared = node.elements + node.op.scratch(node.x.elements)
        peak = max(peak, sum(live.values()) + max(prepared, node.elements))
        if node is not program.input:
            live[node] = node.elements
        for source in node.sources:
            if last_read[source] is node:
                live.pop(source, None)
    return peak


def peak_elements(
    program: Program,
    start: Node,
    passes: Sequence[Pass],
    band_elements: int,
    working_set_of: Callable[[Pass], WorkingSet],
) -> int:
    """Numbers alive at once in `passes`, which start from `start` alone; `working_set_of` is `working_set`, cached."""
    kept = {start: 0 if start is program.input else start.elements}
    small = SMALL + program.statistics + program.carried
    peak = 0
    for each in passes:
        working = working_set_of(each)
        later = working.later
        if program.output in each.targets:  # whoever takes the bands may hold one while the next is computed
            later += program.output.elements // program.output.shape[2] * each.rows
        stays = sum(size for node, size in kept.items() if node not in each.frees)
        freed = sum(kept[node] for node in each.frees)
        # A band is freed when it has been read to its end, so up to one is still held in part.
        held = sum(
            band_rows((node,), node.shape[2], band_elements) * node.elements // node.shape[2] for node in each.frees
        )
        written = {node: node.elements for node in each.targets if each.keep and node is not program.output}
        height = each.targets[0].shape[2]
        bands = -(-height // each.rows)
        freed_step, written_step = freed / bands, sum(written.values()) / bands
        # Concave in the number of bands done: the peak is at an end or where the first whole band is freed.
        turn = min(bands - 1, held / freed_step if freed_step else 0)
        sizes = [min(freed, freed - t * freed_step + held) + t * written_step for t in (0, turn, bands - 1)]
        peak = max(peak, stays + freed + working.first + small, stays + int(max(sizes)) + later + small)
        for node in each.frees:
            kept.pop(node)
        kept.update(written)
    return peak


def working_set(each: Pass) -> WorkingSet:
    """Numbers alive in the largest bands of a pass, beside the kept maps: the walk of `bands`, in sizes only."""
    (target, *_) = each.targets
    if target.attends:
        chunk = target.elements // target.shape[2] * each.rows
        # k, v; a normed band, its q, what it attends to, its projection; the kernel's copy of a projection's weights
        size = 2 * target.elements + 4 * chunk + target.shape[1] ** 2
        return WorkingSet(size, size)
    rows = _rows_read(each, each.rows)
    # What the fastest reader of a map has read and the slowest has not stays for the next band.
    left = {
        node: node.elements // node.shape[2] * (max(read) - min(read))
        for node, read in rows.items()
        if node in each.nodes
    }
    ragged = frozenset(node for node, read in rows.items() if max(read) > min(read))
    first = _Rehearsal(each, {node: max(read) for node, read in rows.items()}, left, ragged)
    # The weights of enlarging convolutions are merged for the pass, from sums that need as much again.
    merged = sum(_workspace(node, 0) * 2 for node in each.nodes if isinstance(node.op, Conv) and node.op.up == 2)
    beginning = max(2 * merged, merged + first.band())
    if each.rows >= target.shape[2]:
        return WorkingSet(beginning, 0)
    later = {node: max(1, max(read) - first.rows[node]) for node, read in _rows_read(each, 2 * each.rows).items()}
    carried = first.carried + sum(left.values())
    return WorkingSet(beginning, merged + _Rehearsal(each, later, {}, ragged, carried).band())


def _rows_read(each: Pass, stop: int) -> dict[Node, list[int]]:
    """Rows of every map that its readers have read, and done with, when those < stop of the targets are made."""
    rows = {target: [min(stop, target.shape[2])] for target in each.targets}
    for node in reversed(each.nodes):
        if isinstance(node.op, Conv) and node.x is not None:
            rows.setdefault(node.x, []).append(node.op.reads(max(rows[node]), node.x.shape[2]))
            if node.add is not None:
                rows.setdefault(node.add, []).append(max(rows[node]))
        elif isinstance(node.op, Pointwise):
            for source in node.sources:
                rows.setdefault(source, []).extend((node.op.reads(max(rows[node])), node.op.leaves(max(rows[node]))))
    return rows


class _Rehearsal:
    """One band of a pass: `rows` of each map are computed.

    Of the first, `left` numbers of each map stay; of a later one, `carried` numbers are there from the band before.
    The bands of `ragged` maps are not those that are read of them.
    """

    def __init__(
        self,
        each: Pass,
        rows: dict[Node, int],
        left: dict[Node, int],
        ragged: frozenset[Node],
        carried: int = 0,
    ) -> None:
        self.rows = rows
        self._left = left
        self.carried = carried  # of a first band, afterwards: what its windows leave to the next
        self._nodes = frozenset(each.nodes)
        self._first = carried == 0
        self._targets = each.targets
        self._gathers = each.gathers
        self._ragged = ragged
        self._live = self._peak = carried
        self._made: set[Node] = set()
        self._unread: dict[Node, int] = {}
        for node in each.nodes:
            for source in node.sources:
                self._unread[source] = self._unread.get(source, 0) + 1

    def band(self) -> int:
        """The peak; the targets' own band is part of it."""
        for target in self._targets:
            self._make(target)
        return max(self._peak, self._live + self._gathers)

    def _make(self, node: Node) -> None:
        if node not in self._nodes or node in self._made:
            return
        self._made.add(node)
        op, x = node.op, node.x
        if isinstance(op, Pointwise):
            self._apply(node, op)
            return
        assert isinstance(op, Conv) and x is not None
        self._make(x)
        window = self._window(op, x, self.rows[node])
        self._take(window)
        if op.norm is not None and node.normed is None:  # a pointwise norm makes its rows before they are written
            self._peak = max(self._peak, self._live + window)
        self._read(x)
        if self._first and not op.windowless:
            carry = (op.kernel - op.stride + op.up - 1) * _window_row(op, x)
            self.carried += carry
            self._take(carry)
        self._take(self._size(node))
        dealt = 0
        if op.up == 2:  # one parity of its rows, with a column to spare, before they are dealt out
            dealt = self._size(node) * (x.shape[3] + 1) // (2 * x.shape[3])
        self._peak = max(self._peak, self._live + dealt + _workspace(node, self.rows[node]))
        self._live -= window
        if node.add is not None:
            self._make(node.add)
            self._read(node.add)

    def _apply(self, node: Node, op: Pointwise) -> None:
        for source in node.sources:
            self._make(source)
        assert node.x is not None
        rows = op.reads(self.rows[node])
        joined = (
            0
            if self._first
            else sum(each.elements // each.shape[2] * rows for each in node.sources if each in self._ragged)
        )
        self._take(self._size(node))
        read = node.x.elements // node.x.shape[2] * rows
        self._peak = max(self._peak, self._live + joined + op.scratch(read))
        for source in node.sources:
            self._read(source)

    def _window(self, op: Conv, x: Node, rows: int) -> int:
        if op.windowless:
            return 0 if x not in self._nodes else self._size(x)
        rows = op.stride * (-(-rows // op.up) - 1) + op.kernel + op.up - 1
        return min(rows, x.shape[2] + op.pad[2] + op.pad[3]) * _window_row(op, x)

    def _size(self, node: Node) -> int:
        return node.elements // node.shape[2] * self.rows[node]

    def _take(self, size: int) -> None:
        self._live += size
        self._peak = max(self._peak, self._live)

    def _read(self, source: Node) -> None:
        self._unread[source] -= 1
        if self._unread[source] == 0 and source in self._nodes:
            self._live -= self._size(source) - self._left.get(source, 0)


def _workspace(node: Node, rows: int) -> int:
    """Numbers that a convolution of so many rows needs for itself: a copy of its weights, or Winograd's tiles.

    oneDNN and cuDNN reorder the weights for each call.
    """
    assert isinstance(node.op, Conv) and node.x is not None
    if node.op.kernels(*node.x.shape[2:]) is not None:
        return workspace(*node.x.shape[:2], node.shape[1], rows, node.shape[3])
    taps = 2 * 2 * 2 if node.op.up == 2 else math.prod(node.op.conv.kernel_size)
    return node.shape[1] * node.x.shape[1] * taps // node.op.conv.groups


def _window_row(op: Conv, x: Node) -> int:
    b, c, _, w = x.shape
    return (op.before + b) * c * (w + sum(op.sides))
