"""Knows the walks over bands that a choice of kept maps makes necessary, in order, and how high their bands are.

A map that is not kept is computed anew in every pass that needs it, and once more per GroupNorm for its statistics.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from app.execution.pointwise import GlobalPointwise
from app.execution.program import Node, Program, inside

MAX_BANDS = 64  # per map: a picture of any size costs a bounded number of operations


@dataclass(frozen=True)
class Pass:
    """One walk, band by band, over the rows of `targets`; the other `nodes` are computed on the way and dropped."""

    targets: tuple[Node, ...]
    nodes: tuple[Node, ...]  # each after its sources, targets included
    rows: int  # of the targets, per band
    keep: bool  # False: the walk is for the targets' statistics only
    frees: tuple[Node, ...] = ()  # kept maps that no later pass reads
    gathers: int = 0  # numbers that it takes to gather a band's statistics, where they are not few

    @property
    def flops(self) -> int:
        """The work of the walk."""
        return sum(node.banded_flops for node in self.nodes)


def band_rows(nodes: Iterable[Node], height: int, band_elements: int) -> int:
    """Rows of a target of `height` per band, so that no band of any of `nodes` exceeds `band_elements` numbers.

    A power of two, so that the bands of neighbouring passes line up; more where `MAX_BANDS` asks for it.
    """
    widest = max(map_.elements for node in nodes for map_ in (node, node.x) if map_ is not None)
    rows = max(1, band_elements * height // widest)
    return min(height, max(1 << (rows.bit_length() - 1), -(-height // MAX_BANDS)))


def passes_between(program: Program, start: Node, kept: Iterable[Node], end: Node, band_elements: int) -> list[Pass]:
    """The passes that lead from the kept map `start` to `end`, keeping only `kept` (in program order) in between."""
    drafts: list[tuple[tuple[Node, ...], tuple[Node, ...], bool]] = []
    known, measured = {start}, {start}
    for group in _groups((*kept, end), known):
        nodes = inside(group, known)
        for node in nodes:
            if (source := node.normed) is not None and source not in measured:
                drafts.append(((source,), inside((source,), known), False))
                measured.add(source)
        drafts.append((group, nodes, True))
        known.update(group)
        measured.update(group)
    last_read: dict[Node, int] = {}
    for i, (_, nodes, _) in enumerate(drafts):
        last_read.update((source, i) for node in nodes for source in node.sources if source in known)
    passes = []
    for i, (targets, nodes, keep) in enumerate(drafts):
        rows = band_rows(nodes, targets[0].shape[2], band_elements)
        frees = tuple(node for node, last in last_read.items() if last == i and node is not program.input)
        gathers = max(_gathering(program, target, rows) for target in targets)
        passes.append(Pass(targets, nodes, rows, keep, frees, gathers))
    return passes


def _gathering(program: Program, target: Node, rows: int) -> int:
    """Numbers needed beside a band of so many rows while its statistics are gathered."""
    band = target.elements // target.shape[2] * rows
    layers = [reader.op for reader in program.readers[target]]
    return max((layer.scratch(band) for layer in layers if isinstance(layer, GlobalPointwise)), default=0)


def _groups(kept: Sequence[Node], known: Iterable[Node]) -> Iterator[tuple[Node, ...]]:
    """Neighbours in `kept` that one walk can write: equally high, and neither is computed from the other."""
    seen = set(known)
    group: tuple[Node, ...] = ()
    for node in kept:
        independent = not any(source in group for each in inside((node,), seen | set(group)) for source in each.sources)
        if group and not (independent and node.shape[2] == group[0].shape[2]):
            yield group
            seen.update(group)
            group = ()
        group = (*group, node)
    yield group
