"""Requests in bursts, what they cost, and what became of them: the same for real replicas and for simulated ones."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median, quantiles


@dataclass(frozen=True)
class Ask:
    """A request of the trace."""

    at: float  # seconds from the start
    model: str


@dataclass(frozen=True)
class Costs:
    """Seconds of what a request goes through, at a moment of the trace; each call draws one."""

    batch: Callable[[int, float], float]  # of so many items
    load: Callable[[float], float]
    way: Callable[[float], float]  # of everything else: the door, transport, reading, writing
    expected_load: float  # as replicas tell it at first
    expected_item: float


@dataclass(frozen=True)
class Outcome:
    """What became of a trace."""

    seconds: list[float]  # from asking to the answer
    loads: Counter[str]  # by model
    requests: Counter[str]  # by replica
    batches: int = 0

    @property
    def p50(self) -> float:
        """The median latency."""
        return median(self.seconds)

    @property
    def p95(self) -> float:
        """19 of 20 are answered within it."""
        return quantiles(self.seconds, n=20)[-1]

    @property
    def mean(self) -> float:
        """The mean latency."""
        return fmean(self.seconds)


def bursts(seconds: float, rate: float, weights: dict[str, float], seed: int = 0) -> list[Ask]:
    """A trace of so many requests a second in bursts of 2 to 10 for one model each, 15 ms apart: somebody's batch."""
    rng, asks, at = random.Random(seed), list[Ask](), 0.0
    while True:
        at += rng.expovariate(rate / 6)  # 6: a burst's mean size
        if at > seconds:
            return sorted(asks, key=lambda ask: ask.at)
        [model] = rng.choices(list(weights), list(weights.values()))
        asks += [Ask(at + 0.015 * index, model) for index in range(rng.randint(2, 10))]


def zipf(models: int) -> dict[str, float]:
    """So many models, each asked for less than the one before."""
    return {f"model {index}": 1 / index for index in range(1, models + 1)}
