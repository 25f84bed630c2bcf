"""Knows how to run a network over bands of rows, exactly: the executions beside `Whole`, and the one way to run any.

`STRIPS` keeps nearly every feature map, as bands that are freed as they are read; `RECOMPUTE` keeps few and computes
the rest anew for each GroupNorm. Both give what `Whole` gives, up to the order of float32 additions; docs/tiling.md
has the reasoning and the figures.
"""

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from app.execution.bands import Statistics, statistics_of, walk
from app.execution.causal import WHOLE_CLIP, Carry, Kept, Slice
from app.execution.footprint import whole_elements
from app.execution.primitive import Network, Whole
from app.execution.program import Node, Program, record
from app.execution.rows import Rows
from app.execution.schedule import Plan, plans

logger = logging.getLogger("app.vae")

STRIPS_SHARE = 0.4  # of Whole's memory: strips are the fastest plan within it
MOST_WORK = 3.0  # times Whole's: beyond, a plan saves too little to be worth its time
ENOUGH = 1.1  # of two plans this close in memory, the one with less work is better

# Numbers per band of a pass's widest map, at most. 2^22 are 32768 pixels of 128 channels: a few bands fit a CPU's last
# cache. A GPU wants work enough per launch.
CPU_BAND, OTHER_BAND, SMALLEST_BAND = 1 << 22, 1 << 24, 1 << 18
BANDS = 32  # of the widest map of a small picture, so that bands stay small beside the maps


@dataclass(frozen=True)
class Banded:
    """An exact execution over bands; a value, chosen per run.

    `strips` is the fastest plan within two fifths of Whole's working memory. `recompute` is the fastest plan within
    `budget_bytes` of it, with lower bands where that helps; the leanest plan where none fits or none are given.
    """

    kind: Literal["strips", "recompute"]
    band_elements: int | None = None  # numbers per band of the widest map; None: what suits the device
    budget_bytes: int | None = None

    def __str__(self) -> str:
        return self.kind

    def plan(self, program: Program, dtype: torch.dtype, device: torch.device) -> Plan:
        """The passes that this execution makes of a program that runs in `dtype` on `device`."""
        band_elements = self.band_elements or _band_elements(program, device)
        found = plans(program, band_elements)
        if self.kind == "strips":
            return _fastest(found, int(STRIPS_SHARE * whole_elements(program))) or _leanest(found, program)
        if self.budget_bytes is None:
            return _leanest(found, program)
        budget = self.budget_bytes // dtype.itemsize
        while (fastest := _fastest(found, budget)) is None and band_elements > SMALLEST_BAND:
            band_elements //= 4
            found = plans(program, band_elements)
        return fastest or found[0]


STRIPS = Banded("strips")
RECOMPUTE = Banded("recompute")

AnyExecution = Whole | Banded


def _band_elements(program: Program, device: torch.device) -> int:
    widest = max(node.elements for node in program.nodes)
    return min(CPU_BAND if device.type == "cpu" else OTHER_BAND, max(SMALLEST_BAND, widest // BANDS))


def _fastest(found: list[Plan], most_elements: int) -> Plan | None:
    fitting = [plan for plan in found if plan.peak_elements <= most_elements]
    return min(fitting, key=lambda plan: plan.flops, default=None)


def _leanest(found: list[Plan], program: Program) -> Plan:
    allowed = [plan for plan in found if plan.flops <= MOST_WORK * program.flops]
    enough = ENOUGH * allowed[0].peak_elements
    return min((plan for plan in allowed if plan.peak_elements <= enough), key=lambda plan: plan.flops)


def forecast_bytes(
    execution: Banded,
    network: Network,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    place: Slice = WHOLE_CLIP,
) -> int:
    """Peak working memory of a run on an input of `shape`, by arithmetic: no tensor is made.

    Of a slice of a clip, with all that is carried.

    Weights, the input, the joined output and the convolutions' own workspace are not counted.
    """
    return execution.plan(record(network, shape, place), dtype, device).peak_elements * dtype.itemsize


@torch.inference_mode()
def execute(
    execution: AnyExecution,
    network: Network,
    x: Tensor,
    *,
    check: Callable[[], None] = lambda: None,
    carry: Carry | None = None,
) -> Generator[tuple[int, Tensor]]:
    """Runs `network` on x (B, C, H, W); yields (first row, band of the output), top to bottom.

    `check` is called between bands and cancels the run by raising. A `Whole` run yields one band. Of a network for
    clips x are the frames of a slice (T, C, H, W), and `carry` is what the slice before it left, and is left anew; with
    none they are the whole clip, of which nothing is kept.
    """
    if isinstance(execution, Whole):
        check()
        yield 0, network(execution, x)
        return
    program = record(network, x.shape, Slice(first=not carry, last=carry is None))
    plan = execution.plan(program, x.dtype, x.device)
    gathers = {node.normed: statistics_of(node) for node in program.nodes if node.normed is not None}
    source = Rows()
    source.append(x)
    maps = {program.input: source}
    statistics: dict[Node, Statistics] = {}
    in_time = {
        node: Kept(node.before, carry.popleft() if carry else None, None if carry is None else Rows())
        for node in program.in_time
    }
    for i, each in enumerate(plan.passes, start=1):
        names = ", ".join("x".join(map(str, target.shape[1:])) for target in each.targets)
        logger.debug(
            "%s pass %d/%d: %s of %s in bands of %d rows",
            execution, i, len(plan.passes), "maps" if each.keep else "statistics", names, each.rows,
        )  # fmt: skip
        for target, row, band in walk(each, maps, statistics, in_time, x):
            check()
            if target in gathers:
                statistics.setdefault(target, gathers[target]()).add(band)
            if target is program.output:
                yield row, band
            elif each.keep:
                maps.setdefault(target, Rows()).append(band)
            del band
        for node in each.frees:
            del maps[node]
    if carry is not None:
        carry.extend(kept.left for kept in in_time.values() if kept.left is not None)


def gather(
    execution: AnyExecution,
    network: Network,
    x: Tensor,
    *,
    check: Callable[[], None] = lambda: None,
    carry: Carry | None = None,
) -> Tensor:
    """`execute`, its bands joined: the network's output (B, C', H', W')."""
    bands = [band for _, band in execute(execution, network, x, check=check, carry=carry)]
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=2)
