"""What was measured of real requests, as a simulation has it: batches, loads, and what each costs."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from statistics import fmean

from benchmarks.trace import Costs, Outcome


@dataclass(frozen=True)
class Done:
    """One request as its client saw it."""

    model: str
    status: int
    sent: float  # since the round began
    seconds: float
    replica: str = ""
    stages: dict[str, float] = field(default_factory=dict)  # seconds


@dataclass(frozen=True)
class Round:
    """The requests of one trace, how often a replica died under one, and how long a load took by what it was told."""

    done: list[Done]
    died: int = 0
    load: float = 0.0


@dataclass(frozen=True)
class Batch:
    """What a forward had, when it began, since the round did, and the seconds that it took."""

    items: int
    began: float
    seconds: float


STAGES = ("queue", "load", "compute")

NEAR = 5
"""Measurements nearest in time, of which one is drawn: a machine that others use is slow for a while, then is not."""


def batches(done: Sequence[Done]) -> list[Batch]:
    """Of each forward: its requests were told the same time by the same replica."""
    found: dict[tuple[str, str, float], list[Done]] = defaultdict(list)
    for each in done:
        if each.status == 200:
            found[each.replica, each.model, each.stages["compute"]].append(each)
    return [
        Batch(len(one), min(each.sent + each.stages["queue"] + each.stages["load"] for each in one), key[2])
        for key, one in found.items()
    ]


def loads(done: Sequence[Done]) -> dict[str, list[tuple[float, float]]]:
    """(when, seconds) of each load, by model: requests that waited for the same one were told the same time."""
    found: dict[str, dict[tuple[str, float], float]] = defaultdict(dict)
    for each in done:
        if each.status == 200 and each.stages["load"] > 0:
            found[each.model].setdefault((each.replica, each.stages["load"]), each.sent + each.stages["queue"])
    return {model: [(at, key[1]) for key, at in found[model].items()] for model in sorted(found)}


def outcome(done: Sequence[Done]) -> Outcome:
    """The same figures as a simulation has."""
    good = [each for each in done if each.status == 200]
    return Outcome(
        [each.seconds for each in good],
        Counter({model: len(seconds) for model, seconds in loads(good).items()}),
        Counter(each.replica for each in good),
        len(batches(good)),
    )


def costs_of(done: Sequence[Done], expected_load: float, seed: int) -> Costs:
    """What one round measured, to be drawn from: of a batch a line over its items, times a ratio to that line."""
    rng, measured = random.Random(seed), batches(done)
    mean = fmean(one.items for one in measured)
    seconds = fmean(one.seconds for one in measured)
    spread = sum((one.items - mean) ** 2 for one in measured)
    slope = sum((one.items - mean) * (one.seconds - seconds) for one in measured) / spread if spread else 0.0
    slope = min(max(slope, 0.0), seconds / mean)
    fixed = seconds - slope * mean
    ratio = _drawn([(one.began, one.seconds / (fixed + slope * one.items)) for one in measured], rng)
    good = [each for each in done if each.status == 200]
    ways = [(each.sent, max(0.0, each.seconds - sum(each.stages[one] for one in STAGES))) for each in good]
    return Costs(
        batch=lambda items, now: (fixed + slope * items) * ratio(now),
        load=_drawn([one for found in loads(done).values() for one in found], rng),
        way=_drawn(ways, rng),
        expected_load=expected_load,
        expected_item=fixed + slope,
    )


def _drawn(measured: Sequence[tuple[float, float]], rng: random.Random) -> Callable[[float], float]:
    """One of those that were measured about then."""

    def draw(now: float) -> float:
        return rng.choice(nsmallest(NEAR, measured, key=lambda one: abs(one[0] - now)))[1]

    return draw
