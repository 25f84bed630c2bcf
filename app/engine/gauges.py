"""The engine's state as Prometheus gauges, read when somebody asks."""

import time
from collections.abc import Iterator
from typing import get_args

from app.engine.batcher import Batcher
from app.engine.engine import Engine
from app.metrics import Gauge
from app.store.checkpoint import Checkpoint
from app.terms import Op


def gauges(engine: Engine) -> Iterator[Gauge]:
    """The state as Prometheus gauges: (name, help, labels, value)."""
    now = time.monotonic()
    entries = engine.store.entries()
    names = [entry.name for entry in entries if isinstance(entry, Checkpoint)]
    for state, count in (("usable", len(names)), ("error", len(entries) - len(names))):
        yield "models", "Model files in the folder, by whether they can be used.", {"state": state}, count
    depths: dict[tuple[str, Op], int] = {(name, op): 0 for name in names for op in get_args(Op)}
    for worker in engine.workers:
        for key, depth in worker.batcher.depths().items():
            depths[key] = depths.get(key, 0) + depth
    for (model, op), depth in depths.items():
        yield "queue_depth", "Jobs waiting.", {"op": op, "model": model}, depth
    batchers: list[Batcher] = [worker.batcher for worker in engine.workers]
    yield "queue_pixels", "Pixels admitted and waiting.", {}, sum(batcher.pixels for batcher in batchers)
    oldest = max(batcher.oldest_age(now) for batcher in batchers)
    yield "queue_oldest_age_seconds", "Age of the oldest waiting job.", {}, oldest
    for worker in engine.workers:
        seconds = worker.batcher.wait_seconds()
        yield "queue_seconds", "Until what is admitted should be done.", {"device": worker.name}, seconds
    yield "requests_in_flight", "Requests admitted and not ended.", {}, engine.open_requests
    yield "draining", "Shutting down.", {}, engine.draining
    for worker in engine.workers:
        yield from worker.gauges()
