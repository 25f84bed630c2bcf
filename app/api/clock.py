"""Milliseconds of each stage of one request, for Server-Timing and the metrics."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from app.engine.jobs import Result
from app.metrics import Metrics


@dataclass
class Clock:
    """Milliseconds of each stage of one request, for Server-Timing."""

    op: str
    metrics: Metrics
    stages: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("read", "queue", "load", "compute", "write"), 0.0)
    )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of its block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] += (time.perf_counter() - started) * 1000

    def add(self, results: Sequence[Result]) -> None:
        """The engine's stages: those of the item that took longest."""
        for stage in ("queue", "load", "compute"):
            self.stages[stage] += max(result.seconds.get(stage, 0.0) for result in results) * 1000

    def finish(self) -> str:
        """The value of Server-Timing; the metrics get the same."""
        for stage, ms in self.stages.items():
            self.metrics.stage_seconds.labels(self.op, stage).observe(ms / 1000)
        return ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in self.stages.items())
