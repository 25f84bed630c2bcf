"""How long a device waits between two forwards: `python -m benchmarks.waiting`.

The device is a fake that takes a fixed time, as a card does: its thread sleeps without the interpreter's lock. Eight
clients in the same process ask for one picture after the other, each a batch of its own. Utilisation is the part of the
time, from the first forward's beginning to the last one's end, in which the device had one.
"""

import argparse
import asyncio
import datetime
import time
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from app.engine import compute
from app.engine.batcher import QueueLimits
from app.engine.compute import Outcome
from app.engine.jobs import Task
from benchmarks.cpu import processor
from benchmarks.pairs import table
from tests.fakes import checkpoint, latent, running, submit

CLIENTS = 8
SIDE = 64  # of a latent; its picture has twice as many pixels a side
PICTURE = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)


class Device:
    """Stands for `compute.forward`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.spans: list[tuple[float, float]] = []

    def __call__(self, module: Any, inputs: list[Tensor], tasks: list[Task], plan: Any, check: Any) -> Outcome:
        began = time.perf_counter()
        check()
        time.sleep(self._seconds)
        self.spans.append((began, time.perf_counter()))
        return Outcome([PICTURE] * len(inputs), [True] * len(inputs), [True] * len(inputs))


async def measure(milliseconds: float, requests: int) -> list[str]:
    """A row: utilisation, and what lies between two forwards."""
    device = Device(milliseconds / 1e3)
    compute.forward = device
    model = checkpoint("toy")
    task, array = Task("decode", model), latent(SIDE)
    async with running(model, limits=QueueLimits(256, 1 << 26, PICTURE.shape[0] * PICTURE.shape[1])) as engine:

        async def client() -> None:
            for _ in range(requests):
                await submit(engine, task, array)

        await submit(engine, task, array)
        await asyncio.sleep(1)  # what is counted in the background after a load
        device.spans.clear()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    spans = device.spans
    used = sum(end - began for began, end in spans) / (spans[-1][1] - spans[0][0])
    gaps = sorted(after - end for (_, end), (after, _) in pairwise(spans))
    late = gaps[int(0.95 * len(gaps))]
    return [f"{milliseconds:g}", f"{100 * used:.1f} %", f"{median(gaps) * 1e6:.0f}", f"{late * 1e6:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="of each client; default %(default)s")
    args = parser.parse_args()
    rows = [asyncio.run(measure(milliseconds, args.requests)) for milliseconds in (5.0, 20.0, 100.0)]
    print(f"{datetime.date.today()}, {processor()}, {CLIENTS} clients, {args.requests} requests each\n")
    print(table(("a forward, ms", "utilisation", "between two, p50, us", "p95"), rows))


if __name__ == "__main__":
    main()
