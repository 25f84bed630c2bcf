"""A soak on loopback: rounds of the load's mixture without a pause, while models evict each other and one is replaced.

`python -m benchmarks.soak --seconds 3600` checks every 200 against the network run by itself, in this process and
without the engine, the queue or the wire, with the weights that the answer names; every other status against what may
come of its request; and the metrics against what the clients saw. After each round, when nothing is left to do, it
reads the process's memory, files, threads and tasks. Exit status 1 where an answer is wrong, or something grows.
"""

import argparse
import asyncio
import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import linear_regression, mean

import httpx
import numpy as np
import torch

from app.execution.primitive import Whole
from app.store.checkpoint import load_autoencoder
from app.store.store import open_checkpoint
from benchmarks.calls import MODELS, Call, array_of, calls, write_models
from benchmarks.load import LEVELS, Report, check_metrics, load, scrape, service, total
from tests.store.weights import state_of, write

HOT = "kl-a"
"""The model that is replaced."""
SWAP_SECONDS = 15.0
CACHE_BYTES = 3_000_000
"""Room for one of the larger models at a time."""
WARM = 0.25
"""Of the rounds, the first, in which heaps and caches find their size."""
LEAST_ROUNDS = 8
"""Below which nothing is said of growth."""
MOST_GROWTH = 0.01
"""Of the memory, in 10 000 requests."""


@dataclass(frozen=True)
class Quiet:
    """A process with nothing to do, after so many requests."""

    requests: int
    memory: int
    """Resident bytes."""
    files: int
    threads: int
    tasks: int


@dataclass
class Soak(Report):
    """And what the process had after each round."""

    swaps: int = 0
    last: dict[str, str] = field(default_factory=dict)  # hash of the weights of each model's last answer
    evictions: int = 0
    levels: list[Quiet] = field(default_factory=list)

    @property
    def warm(self) -> list[Quiet]:
        """The levels that count."""
        return self.levels[int(len(self.levels) * WARM) :]

    def growth(self) -> float:
        """Of the memory, as a share of it in 10 000 requests: the slope of a straight line."""
        requests, memory = zip(*((each.requests, each.memory) for each in self.warm), strict=True)
        return float(linear_regression(requests, memory).slope * 10_000 / mean(memory))

    def judge(self) -> None:
        """Whether something grows: memory by its slope, the rest where the last third lies above the first."""
        if len(self.levels) < LEAST_ROUNDS:
            return
        if self.growth() > MOST_GROWTH:
            self.problems.append(f"memory grows by {self.growth():.2%} in 10 000 requests")
        third = len(self.warm) // 3
        for name in ("files", "threads", "tasks"):
            first, last = ([getattr(each, name) for each in part] for part in (self.warm[:third], self.warm[-third:]))
            if min(last) > max(first):
                self.problems.append(f"{name} grow from {max(first)} to {min(last)}")


class Alone:
    """What the networks give by themselves."""

    def __init__(self, files: list[Path]) -> None:
        self._modules = {}
        for path in files:
            checkpoint = open_checkpoint(path, "sd1")
            module = load_autoencoder(checkpoint, torch.float32, torch.device("cpu"))
            self._modules[hashlib.sha256(path.read_bytes()).hexdigest()] = checkpoint.family, module

    @torch.inference_mode()
    def __call__(self, call: Call, sha256: str) -> np.ndarray:
        """Pixels (H, W, 3) of 8 bits, or scaled latents (1, C, h, w) in float16."""
        family, module = self._modules[sha256]
        low, high = family.pixel_range
        found: np.ndarray
        if call.op == "decode":
            z = torch.from_numpy(array_of("encode", call.body)).float()
            x = module.decode(Whole(), family.latent_format.unscale(z))[0]
            found = ((x - low) / (high - low) * 255).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        else:
            x = torch.from_numpy(array_of("decode", call.body).copy()).permute(2, 0, 1)[None].float() / 255
            moments = module.encode(Whole(), x * (high - low) + low)
            found = family.latent_format.scale(module.posterior(moments).mode()).half().numpy()
        return found


def wrong(call: Call, answer: httpx.Response, alone: Alone) -> str | None:
    """What is wrong with a 200, if anything."""
    expected, got = alone(call, answer.headers["x-model-sha256"]), array_of(call.op, answer.content)
    if got.shape != expected.shape:
        return f"{call.op} {call.query}: {got.shape} instead of {expected.shape}"
    limit = LEVELS if call.op == "decode" else float(np.spacing(np.abs(expected).max()))
    distance = float(np.abs(got.astype(float) - expected).max())
    return f"{call.op} {call.query}: {distance} from the network by itself" if distance > limit else None


def compare(good: list[tuple[Call, httpx.Response]], alone: Alone) -> list[str]:
    """What is wrong with all these."""
    return [said for call, answer in good if (said := wrong(call, answer, alone))]


async def swap(kept: list[Path], place: Path, report: Soak) -> None:
    """The hot model is one and the other in turn, each whole at once, and once the one before it has answered.

    A file that is replaced faster than it can be read would be a 503, rightly.
    """
    for index in count(1):
        await asyncio.sleep(SWAP_SECONDS)
        sha256 = hashlib.sha256(kept[(index - 1) % len(kept)].read_bytes()).hexdigest()
        while report.last.get(HOT) != sha256:  # noqa: ASYNC110  a round that has ended tells nobody
            await asyncio.sleep(1)
        partial = place.with_suffix(".part")
        await asyncio.to_thread(partial.write_bytes, kept[index % len(kept)].read_bytes())
        partial.replace(place)
        report.swaps += 1


def quiet(pid: int, requests: int, tasks: int) -> Quiet:
    """As the kernel says."""
    process = Path(f"/proc/{pid}")
    lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    memory, threads = int(lines["VmRSS"].split()[0]) << 10, int(lines["Threads"])
    return Quiet(requests, memory, len(list((process / "fd").iterdir())), threads, tasks)


async def run(
    goes_on: Callable[[int], bool], size: int, concurrency: int, seed: int, say: Callable[[str], object] = print
) -> Soak:
    """Rounds of `size` requests while `goes_on`, given how many there were."""
    rng, report = random.Random(seed), Soak()
    with tempfile.TemporaryDirectory() as name:
        models, kept = Path(name) / "models", Path(name) / "kept"
        for folder in (models, kept):
            folder.mkdir()
            write_models(folder)
        hot = [kept / f"{HOT}.safetensors", write(kept / "other.safetensors", state_of(MODELS[HOT][0], 11))]
        alone = Alone(sorted(kept.iterdir()))
        settings = {"cache_bytes": str(CACHE_BYTES), "queue_size": "64"}
        async with service(models, Path(name) / "log", "benchmarks.counted", **settings) as (url, process):
            swapping = asyncio.create_task(swap(hot, models / hot[0].name, report))
            sent, began = 0, time.monotonic()
            while goes_on(len(report.levels)):
                good = await load(url, calls(size, rng), concurrency, report)
                report.problems += await asyncio.to_thread(compare, good, alone)
                report.compared += len(good)
                report.last |= {each.headers["x-model"]: each.headers["x-model-sha256"] for _, each in good}
                report.seconds.clear()
                sent += size
                await check_metrics(url, sent, report)
                report.levels.append(quiet(process.pid, sent, total(await scrape(url), "asyncio_tasks")))
                say(f"{time.monotonic() - began:.0f} s  {report.levels[-1]}  {len(report.problems)} problems")
            report.wall = time.monotonic() - began
            swapping.cancel()
            await asyncio.wait([swapping])
            if not swapping.cancelled():
                report.problems.append(f"swapping ended: {swapping.exception()!r}")
            report.evictions = total(await scrape(url), "model_evictions_total")
            log = (Path(name) / "log").read_text(errors="replace")
            if bugs := log.count("Traceback (most recent call last)"):
                report.problems.append(f"{bugs} tracebacks in the log: {log[log.index('Traceback') :][:2000]}")
    report.judge()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--round", type=int, default=500, help="requests between two looks at the process")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small gain nothing from more, and wait for each other
    torch.set_num_threads(1)
    until = time.monotonic() + args.seconds
    report = asyncio.run(run(lambda _: time.monotonic() < until, args.round, args.concurrency, args.seed))
    statuses = ", ".join(f"{status} x {count}" for status, count in sorted(report.statuses.items()))
    print(f"{report.levels[-1].requests} requests in {report.wall:.0f} s: {statuses}")
    print(f"{report.compared} answers compared, {report.swaps} swaps, {report.evictions} evictions")
    if len(report.levels) >= LEAST_ROUNDS:
        print(f"memory: {report.growth():+.2%} in 10 000 requests, after the first {WARM:.0%}")
    for problem in report.problems[:20]:
        print("PROBLEM:", problem)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
