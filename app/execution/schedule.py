"""Knows which feature maps to keep: every plan that no other plan beats in both memory and work.

Between two cuts of the program (nodes at which no other map is live) the choice is free of the rest, so a dynamic
programme over the cuts finds them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations

from app.execution.footprint import WorkingSet, peak_elements, working_set
from app.execution.passes import Pass, passes_between
from app.execution.program import Node, Program

MAX_CHOICES = 4  # inner maps of a segment whose every subset is tried; beyond, those that are read as a whole
MAX_WORK = 4.0  # times Whole's: plans with more are not looked at


@dataclass(frozen=True, eq=False)
class Plan:
    """The passes from the input to the output, and what they cost."""

    passes: tuple[Pass, ...]
    peak_elements: int  # numbers alive at once, neither input nor joined output counted
    flops: int


def plans(program: Program, band_elements: int) -> list[Plan]:
    """Every plan that no other beats in both memory and work, leanest first."""
    cuts = program.cuts()
    place = {node: i for i, node in enumerate(program.nodes)}
    working_set_of = cache(working_set)  # many segments share their first passes
    best: list[list[Plan]] = [[Plan((), 0, 0)]]
    for j in range(1, len(cuts)):
        found: list[Plan] = []
        for i in range(j):
            inner = program.nodes[place[cuts[i]] + 1 : place[cuts[j]]]
            choices = _choices(inner, cuts[j], alone=i == j - 1)
            for edge in _segment(program, cuts[i], inner, choices, cuts[j], band_elements, working_set_of):
                for plan in best[i]:
                    peak = max(plan.peak_elements, edge.peak_elements)
                    found.append(Plan(plan.passes + edge.passes, peak, plan.flops + edge.flops))
        best.append(_frontier(plan for plan in found if plan.flops <= MAX_WORK * program.flops))
    return best[-1]


def _choices(inner: tuple[Node, ...], end: Node, alone: bool) -> tuple[Node, ...]:
    """The maps of a segment that it may pay to keep; `alone` where no cut lies inside."""
    if len(inner) <= MAX_CHOICES:
        return inner
    read = {node.normed for node in (*inner, end)} if alone else frozenset()
    measured = tuple(node for node in inner if node in read)
    return measured if len(measured) <= MAX_CHOICES else ()


def _segment(
    program: Program,
    start: Node,
    inner: tuple[Node, ...],
    choices: tuple[Node, ...],
    end: Node,
    band_elements: int,
    working_set_of: Callable[[Pass], WorkingSet],
) -> Iterator[Plan]:
    """The ways from one cut to a later one: nothing between them kept, or some of it where it is little."""
    if any(node.attends for node in inner) or (end.attends and inner):
        return
    sizes = range(len(choices) + 1)
    for kept in chain.from_iterable(combinations(choices, size) for size in sizes):
        passes = passes_between(program, start, kept, end, band_elements)
        flops = sum(each.flops for each in passes)
        if flops > MAX_WORK * program.flops:
            continue
        yield Plan(tuple(passes), peak_elements(program, start, passes, band_elements, working_set_of), flops)
        if len(passes) == 1:
            return  # one walk without statistics: nothing to be gained by keeping more


def _frontier(found: Iterable[Plan]) -> list[Plan]:
    frontier: list[Plan] = []
    for plan in sorted(found, key=lambda plan: (plan.peak_elements, plan.flops)):
        if not frontier or plan.flops < frontier[-1].flops:
            frontier.append(plan)
    return frontier
