"""A hot swap under load, on loopback: a model's file is replaced again and again while clients ask for it.

`python -m benchmarks.swap` starts the service, keeps it busy, and replaces a file atomically and in place, slowly
written, and renames another one that is asked for by its hash. No request may fail, every answer names the weights that
it was made with and equals what these give alone, and new weights must answer within two seconds of the swap. Exit
status 1 where any of this does not hold.
"""

import argparse
import asyncio
import hashlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
import numpy as np

from benchmarks.calls import array_of, latent, npy, png
from benchmarks.load import LEVELS, client, service
from tests.store.weights import state_of, write

EFFECT_SECONDS = 2.0  # from the end of a swap to the first answer with the new weights
WRITING_SECONDS = 1.5  # that a slow writer takes
PIECES = 12
PAUSE_SECONDS = 0.5  # of load between two swaps
SIDE = 32


@dataclass(frozen=True)
class Call:
    """One request."""

    op: str
    body: bytes


@dataclass
class Report:
    """What happened, and what should not have."""

    statuses: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)  # by the weights that gave them
    swaps: dict[str, list[float]] = field(default_factory=dict)  # seconds until the new weights answered, by kind
    problems: list[str] = field(default_factory=list)


class Swaps:
    """The folder: `hot`, which is A or B in turn, and a third model under two names in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, bytes] = {}  # by sha256
        for seed in range(3):
            content = write(folder.parent / "made.safetensors", state_of("sd1", seed)).read_bytes()
            self.files[hashlib.sha256(content).hexdigest()] = content
        self.a, self.b, self.still = self.files
        folder.mkdir()
        self.hot = folder / "hot.safetensors"
        self.names = [folder / "still.safetensors", folder / "moved.safetensors"]

    async def put(self, path: Path, sha256: str) -> None:
        """Atomically: a file beside it is renamed."""
        partial = path.with_suffix(".part")
        await asyncio.to_thread(partial.write_bytes, self.files[sha256])
        partial.replace(path)

    async def write_slowly(self, path: Path, sha256: str) -> None:
        """In place: the file is cut to nothing and grows."""
        content = self.files[sha256]
        size = -(-len(content) // PIECES)
        with path.open("wb") as file:
            for begin in range(0, len(content), size):
                file.write(content[begin : begin + size])
                file.flush()
                await asyncio.sleep(WRITING_SECONDS / PIECES)

    def rename(self) -> None:
        """The third model takes its other name."""
        self.names[0].rename(self.names[1])
        self.names.reverse()


def make_calls(rng: random.Random) -> list[Call]:
    """Some of each operation, of one size so that they share batches."""
    return [
        *(Call("encode", png(rng, SIDE)) for _ in range(3)),
        *(Call("decode", npy(latent(rng, SIDE))) for _ in range(3)),
    ]


async def alone(url: str, calls: list[Call], model: str) -> list[np.ndarray]:
    """What a model gives when nothing else runs."""
    async with client(1) as http:
        answers = [await http.post(f"{url}/{call.op}", params={"model": model}, content=call.body) for call in calls]
    return [array_of(call.op, answer.content) for call, answer in zip(calls, answers, strict=True)]


async def expect(folder: Path, swaps: Swaps, calls: list[Call]) -> dict[str, list[np.ndarray]]:
    """The lone results of all weights, by their sha256."""
    place = folder / "all"
    place.mkdir()
    for sha256, content in swaps.files.items():
        (place / f"{sha256}.safetensors").write_bytes(content)
    async with service(place, folder / "log-alone") as (url, _):
        return {sha256: await alone(url, calls, sha256) for sha256 in swaps.files}


class Clients:
    """Ask without end, and check every answer."""

    def __init__(
        self, url: str, swaps: Swaps, calls: list[Call], expected: dict[str, list[np.ndarray]], report: Report
    ) -> None:
        self.url, self.swaps, self.calls, self.expected, self.report = url, swaps, calls, expected, report
        self.stopping = False
        self.seen: dict[str, float] = {}  # when weights answered last

    async def run(self, seed: int) -> None:
        """One client."""
        rng = random.Random(seed)
        async with client(1) as http:
            while not self.stopping:
                index = rng.randrange(len(self.calls))
                by_hash = rng.random() < 0.25
                model = self.swaps.still[:16] if by_hash else "hot"
                call = self.calls[index]
                try:
                    answer = await http.post(f"{self.url}/{call.op}", params={"model": model}, content=call.body)
                except httpx.TransportError as error:
                    self.report.problems.append(f"{call.op} {model}: no answer, {error!r}")
                    continue
                self._check(answer, index, {self.swaps.still} if by_hash else {self.swaps.a, self.swaps.b})

    def _check(self, answer: httpx.Response, index: int, allowed: set[str]) -> None:
        call = self.calls[index]
        self.report.statuses[str(answer.status_code)] += 1
        if answer.status_code != 200:
            self.report.problems.append(f"{call.op}: {answer.status_code} {answer.text[:300]}")
            return
        sha256 = answer.headers["x-model-sha256"]
        self.report.answers[sha256[:8]] += 1
        if sha256 not in allowed:
            self.report.problems.append(f"{call.op}: answered by {sha256[:8]}, which nobody asked for")
            return
        self.seen[sha256] = time.monotonic()
        got, expected = array_of(call.op, answer.content), self.expected[sha256][index]
        limit = LEVELS if call.op == "decode" else float(np.spacing(np.abs(expected).max()))
        distance = float(np.abs(got.astype(float) - expected).max()) if got.shape == expected.shape else np.inf
        if distance > limit:
            self.report.problems.append(f"{call.op}: {distance} from what {sha256[:8]} gives alone, more than {limit}")


async def swap(clients: Clients, kind: str, sha256: str, report: Report, limit: float) -> None:
    """One swap, and how long the new weights take to answer."""
    swaps = clients.swaps
    if kind == "atomic":
        await swaps.put(swaps.hot, sha256)
    elif kind == "in place":
        await swaps.write_slowly(swaps.hot, sha256)
    else:
        swaps.rename()
        sha256 = swaps.still
    begun = time.monotonic()
    try:
        async with asyncio.timeout(10 * EFFECT_SECONDS):
            while clients.seen.get(sha256, 0.0) < begun:  # noqa: ASYNC110  the clients tell nobody
                await asyncio.sleep(0.01)
    except TimeoutError:
        report.problems.append(f"{kind}: {sha256[:8]} did not answer within {10 * EFFECT_SECONDS:g} s")
    seconds = time.monotonic() - begun
    report.swaps.setdefault(kind, []).append(seconds)
    if seconds > limit:
        report.problems.append(f"{kind}: {seconds:.2f} s until {sha256[:8]} answered, more than {limit:g}")
    await asyncio.sleep(PAUSE_SECONDS)


async def run(count: int, concurrency: int, seed: int, limit: float = EFFECT_SECONDS, **settings: str) -> Report:
    """The whole of it: `count` swaps, each of the three kinds in turn."""
    rng, report = random.Random(seed), Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        swaps = Swaps(folder / "models")
        calls = make_calls(rng)
        expected = await expect(folder, swaps, calls)
        await swaps.put(swaps.hot, swaps.a)
        await swaps.put(swaps.names[0], swaps.still)
        async with service(swaps.folder, folder / "log", **settings) as (url, _):
            clients = Clients(url, swaps, calls, expected, report)
            asking = [asyncio.create_task(clients.run(seed + number)) for number in range(concurrency)]
            sha256 = swaps.a
            for index in range(count):
                kind = ("atomic", "in place", "renamed")[index % 3]
                if kind != "renamed":
                    sha256 = swaps.b if sha256 == swaps.a else swaps.a
                await swap(clients, kind, sha256, report, limit)
            clients.stopping = True
            await asyncio.gather(*asking)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-bytes", help="of the service: little, so that the models evict each other")
    parser.add_argument("--limit", type=float, default=EFFECT_SECONDS, help="seconds until a swap must have its effect")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small gain nothing from more, and wait for each other
    settings = {"cache_bytes": args.cache_bytes} if args.cache_bytes else {}
    report = asyncio.run(run(args.swaps, args.concurrency, args.seed, args.limit, **settings))
    print(f"{sum(report.statuses.values())} requests: {dict(report.statuses)}; answered by {dict(report.answers)}")
    for kind, seconds in report.swaps.items():
        print(f"{kind}: {len(seconds)} swaps, new weights after {median(seconds):.2f} s, {max(seconds):.2f} s at most")
    for problem in report.problems[:20]:
        print(f"PROBLEM  {problem}")
    print("all good" if not report.problems else f"{len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
