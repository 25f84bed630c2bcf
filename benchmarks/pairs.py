"""Times several ways to do the same work against each other, so that a busy machine wrongs none of them.

All run in every round, in turns; what is compared is the median over the rounds of the ratio within a round.
"""

from collections.abc import Callable, Iterable, Mapping
from statistics import median

Timed = Callable[[], float]
"""Does the work once and returns the seconds that it took."""


def alternate(runs: Mapping[str, Timed], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """The seconds of each run, round by round; every other round goes through them in reverse."""
    for _ in range(warmup):
        for timed in runs.values():
            timed()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(rounds):
        for name in names:
            seconds[name].append(runs[name]())
        names.reverse()
    return seconds


def milliseconds(seconds: list[float]) -> str:
    """The median, with three significant digits or all before the point."""
    value = median(seconds) * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speedup(ours: list[float], peer: list[float]) -> str:
    """How many times as fast as the peer: the median of the rounds' ratios."""
    return f"×{median(p / o for o, p in zip(ours, peer, strict=True)):.2f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
