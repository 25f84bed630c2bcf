"""What was measured of real requests, as a simulation has it: batches, loads, and what each costs."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
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


def batches(done: Sequence[Done]) -> list[tuple[int, float]]:
    """(items, seconds of compute) of each batch: its requests were told the same time by the same replica."""
    sizes = Counter((each.replica, each.model, each.stages["compute"]) for each in done if each.status == 200)
    return [(size, key[2]) for key, size in sizes.items()]


def loads(done: Sequence[Done]) -> dict[str, list[float]]:
    """Seconds of each load, by model: requests that waited for the same one were told the same time."""
    found: dict[str, set[tuple[str, float]]] = defaultdict(set)
    for each in done:
        if each.status == 200 and each.stages["load"] > 0:
            found[each.model].add((each.replica, each.stages["load"]))
    return {model: [seconds for _, seconds in found[model]] for model in sorted(found)}


def outcome(done: Sequence[Done]) -> Outcome:
    """The same figures as a simulation has."""
    good = [each for each in done if each.status == 200]
    return Outcome(
        [each.seconds for each in good],
        Counter({model: len(seconds) for model, seconds in loads(good).items()}),
        Counter(each.replica for each in good),
        len(batches(good)),
    )


def costs_of(done: Sequence[Done], seed: int) -> Costs:
    """What was measured, to be drawn from: of a batch a line over its size, times one of the ratios to that line."""
    rng, measured = random.Random(seed), batches(done)
    mean = fmean(size for size, _ in measured)
    seconds = fmean(took for _, took in measured)
    spread = sum((size - mean) ** 2 for size, _ in measured)
    slope = sum((size - mean) * (took - seconds) for size, took in measured) / spread if spread else 0.0
    slope = min(max(slope, 0.0), seconds / mean)
    fixed = seconds - slope * mean
    ratios = [took / (fixed + slope * size) for size, took in measured]
    loaded = [took for found in loads(done).values() for took in found]
    ways = [
        each.seconds - sum(each.stages[name] for name in ("queue", "load", "compute"))
        for each in done
        if each.status == 200
    ]
    return Costs(
        batch=lambda size: (fixed + slope * size) * rng.choice(ratios),
        load=lambda: rng.choice(loaded),
        way=lambda: max(0.0, rng.choice(ways)),
        expected_load=fmean(loaded),
        expected_item=fixed + slope,
    )
