"""What the service costs beside the model: `python -m benchmarks.overhead`.

A forward is replaced by a photograph of 1024x1024 that is there already, so that all the processor time of the service
is everything but the model: HTTP, reading the latent, queue, threads, the PNG. Sizes that were not asked for before are
among the requests, each in its turn behind one that was: what its plan costs is the difference.
"""

import argparse
import asyncio
import datetime
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from torch import Tensor

from app import cli
from app.engine import compute
from app.engine.compute import Outcome
from app.engine.jobs import Task
from app.wire.png import write_png
from benchmarks.calls import latent, npy
from benchmarks.cpu import processor
from benchmarks.load import service
from benchmarks.pairs import milliseconds, table
from benchmarks.peer import peer
from benchmarks.png import PICTURES, SIDE, photograph
from tests.store.weights import write


def serve() -> int:
    """The service, whose model is a photograph."""
    pictures = [photograph(name) for name in PICTURES]

    def forward(module: Any, inputs: list[Tensor], tasks: list[Task], plan: Any, check: Any) -> Outcome:
        check()
        side = inputs[0].shape[-1] * 8
        found = [pictures[index % len(pictures)][:side, :side] for index in range(len(inputs))]
        return Outcome([np.ascontiguousarray(each) for each in found], [True] * len(inputs), [True] * len(inputs))

    compute.forward = forward
    return cli.main()


def own_seconds(pid: int) -> float:
    """Processor time of all threads of a process so far; Linux only."""
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


async def run(rounds: int, count: int) -> list[list[str]]:
    """Rows of what was measured."""
    with tempfile.TemporaryDirectory() as name:
        models = Path(name) / "models"
        models.mkdir()
        write(models / "taesd.safetensors", peer("tiny").state_dict())
        async with service(models, Path(name) / "log", "benchmarks.overhead") as (url, process):
            return await _measured(url, process.pid, rounds, count)


async def _measured(url: str, pid: int, rounds: int, count: int) -> list[list[str]]:
    rng = random.Random(0)
    usual = npy(latent(rng, SIDE))
    own, waits, first, writes = [], [], [], []
    async with httpx.AsyncClient(timeout=300, trust_env=False) as http:

        async def ask(body: bytes) -> float:
            """Seconds outside of the forward."""
            began = time.perf_counter()
            answer = await http.post(f"{url}/decode", content=body)
            seconds = time.perf_counter() - began
            answer.raise_for_status()
            found = re.search(r"compute;dur=([\d.]+)", answer.headers["server-timing"])
            assert found is not None
            return seconds - float(found[1]) / 1e3

        for _ in range(5):
            await ask(usual)
        await asyncio.sleep(3)  # what is counted in the background after a load
        pictures = [photograph(each) for each in PICTURES]
        for index in range(rounds):
            before = own_seconds(pid)
            waits += [await ask(usual) for _ in range(count)]
            own.append((own_seconds(pid) - before) / count)
            first.append(await ask(npy(latent(rng, SIDE - 8 * (index + 1)))))
            for pixels in pictures:
                began = time.thread_time()
                write_png(pixels)
                writes.append(time.thread_time() - began)
    return [
        ["of the processor, a request", milliseconds(own)],
        ["of that the PNG", milliseconds(writes)],
        ["from the request to the answer, the client's share included, p50", milliseconds(waits)],
        ["the first request of a size", milliseconds(first)],
        ["that less the one above, in the same round", f"{(median(first) - median(waits)) * 1e3:.2g}"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=20, help="a round; default %(default)s")
    args = parser.parse_args()
    rows = asyncio.run(run(args.rounds, args.requests))
    print(f"{datetime.date.today()}, {processor()}, medians of {args.rounds} rounds of {args.requests} requests\n")
    print(table(["1024 px, PNG", "ms"], rows))


if __name__ == "__main__":
    if "serve" in sys.argv[1:2]:
        sys.exit(serve())
    main()
