"""More requests than the service can serve: `python -m benchmarks.overload`, on loopback, small random models.

Requests come at a constant rate, whatever becomes of those before them: 1, 2, 5 and 10 times what the service did just
before with as many at once as it likes, so that only the ratio of two neighbouring measurements is told. Every 200 is
held against the network run by itself; a 429 must say when to come back; a 504 is past its deadline. Goodput is what
was answered rightly and in time. Exit status 1 where an answer is wrong, or none came.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx
import torch

from benchmarks.calls import Call, latent, npy, write_models
from benchmarks.load import service
from benchmarks.soak import Alone, compare

SIDE = 256
"""Pixels of a picture: so much work that sending the request is little beside it."""
AT_ONCE = 16
DIFFERENT = 8
FACTORS = (1, 2, 5, 10)


@dataclass
class Run:
    """What came of one rate."""

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    good: list[tuple[Call, httpx.Response]] = field(default_factory=list)
    took: list[float] = field(default_factory=list)  # seconds, of each 200
    problems: list[str] = field(default_factory=list)

    def rate(self, patience: float) -> float:
        """200s a second, those in time."""
        return sum(each <= patience for each in self.took) / self.seconds


async def one(http: httpx.AsyncClient, url: str, call: Call, patience: float, run: Run) -> None:
    """Sends it, and judges what is not a 200."""
    began = time.monotonic()
    headers = {"X-Request-Timeout-Ms": str(round(patience * 1000))}
    try:
        answer = await http.post(f"{url}/{call.op}", params=call.query, content=call.body, headers=headers)
    except httpx.TransportError as error:
        run.statuses["none"] += 1
        run.problems.append(f"no answer: {error!r}")
        return
    took = time.monotonic() - began
    run.statuses[str(answer.status_code)] += 1
    if answer.status_code == 200:
        run.good.append((call, answer))
        run.took.append(took)
    elif answer.status_code == 429:
        if int(answer.headers.get("retry-after", 0)) < 1:
            run.problems.append("a 429 without Retry-After")
    elif answer.status_code != 504 or took < patience:
        run.problems.append(f"{answer.status_code} after {took:.2f} s: {answer.text[:200]}")


async def closed(http: httpx.AsyncClient, url: str, work: list[Call], seconds: float, patience: float) -> Run:
    """So many at once, each followed by the next."""
    run, began, rng = Run(), time.monotonic(), random.Random(0)

    async def goes_on() -> None:
        while time.monotonic() - began < seconds:
            await one(http, url, rng.choice(work), patience, run)

    await asyncio.gather(*(goes_on() for _ in range(AT_ONCE)))
    run.seconds = time.monotonic() - began
    return run


async def opened(
    http: httpx.AsyncClient, url: str, work: list[Call], rate: float, seconds: float, patience: float
) -> Run:
    """At a rate; what was sent within `seconds` is waited for, and what was answered until then is counted."""
    run, began, rng = Run(), time.monotonic(), random.Random(1)
    sent = []
    for index in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, began + index / rate - time.monotonic()))
        sent.append(asyncio.ensure_future(one(http, url, rng.choice(work), patience, run)))
    await asyncio.gather(*sent)
    run.seconds = time.monotonic() - began
    return run


def told(factor: int, before: Run, run: Run, patience: float) -> str:
    """One line of the table."""
    cuts = quantiles(run.took, n=100) if len(run.took) > 1 else [float("nan")] * 99
    statuses = ", ".join(f"{status} x {count}" for status, count in sorted(run.statuses.items()))
    share = run.rate(patience) / before.rate(patience)
    return (
        f"{factor:2d} x {before.rate(patience):5.1f}/s: goodput {share:.0%}, "
        f"median {cuts[49]:.2f} s, 99 % within {cuts[98]:.2f} s; {statuses}"
    )


async def measure(
    seconds: float, patience: float, queue_size: int, factors: tuple[int, ...] = FACTORS, side: int = SIDE
) -> tuple[list[str], list[Run]]:
    """Prints the table; what was wrong, and what came of each measurement."""
    rng, problems = random.Random(0), list[str]()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        write_models(models)
        alone = Alone(sorted(models.iterdir()))
        query = {"model": "kl-a"}
        work = [Call("good", "decode", query, npy(latent(rng, side)), frozenset({200})) for _ in range(DIFFERENT)]
        limits = httpx.Limits(max_connections=4096, max_keepalive_connections=0)
        settings = {"queue_size": str(queue_size)}
        async with (
            service(models, Path(folder) / "log", **settings) as (url, _),
            httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as http,
        ):
            await closed(http, url, work, seconds / 2, 300)  # its first batches
            for factor in factors:
                before = await closed(http, url, work, seconds, 300)
                run = await opened(http, url, work, factor * before.rate(300), seconds, patience)
                runs += before, run
                print(told(factor, before, run, patience), flush=True)
                for each in (before, run):
                    problems += each.problems + await asyncio.to_thread(compare, each.good, alone)
    return problems, runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement; there are two for each rate")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that each request gives")
    parser.add_argument("--queue-size", type=int, default=32)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    problems, _ = asyncio.run(measure(args.seconds, args.patience, args.queue_size))
    for problem in problems[:20]:
        print("PROBLEM:", problem)
    print(f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
