"""What previews cost: the linear map by itself, a stream, and full decodes with and without a flood of previews.

`python -m benchmarks.previews` times the map on latents of 1024 px in this process; then it starts the service with
the embedded model and a TAESD of random weights. To a stream latents come at a sampler's pace, and then as fast as they
are taken. Full decodes go one after the other, in turns alone, beside clients that ask for linear previews as fast as
they are answered, and beside a process that takes a core and asks for nothing, which on a small machine is most of what
clients cost. What is compared is the median over the rounds of the ratio of their medians.
"""

import argparse
import asyncio
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from app.engine.linear import apply
from app.store.linear import Linear
from benchmarks.calls import latent, npy
from benchmarks.cpu import processor
from benchmarks.load import service
from benchmarks.pairs import milliseconds, table
from tests.store.weights import state_of, write

FULL = {"model": "latentd-small"}
LINEAR = FULL | {"preview": "linear"}
EMBEDDED = Path(__file__).resolve().parents[1] / "models" / "VAE" / "latentd-small.safetensors"
LATENTS = {
    "SD, SDXL": (4, 128, 1),
    "SD3, FLUX.1": (16, 128, 1),
    "FLUX.2, raw": (32, 128, 1),
    "FLUX.2": (128, 64, 2),
}
"""Of 1024 px: channels, side of the grid, positions of a picture's grid in each on a side."""


def alone(rounds: int) -> str:
    """The map in this process, on float16."""
    draw = np.random.default_rng(0)
    rows = []
    for name, (channels, side, patch) in LATENTS.items():
        linear = Linear(draw.normal(0, 0.1, (channels + 1, 3 * patch * patch)).astype(np.float32), 20.0)
        array = draw.standard_normal((channels, side, side)).astype(np.float16)
        seconds, own = [], []
        for _ in range(rounds):
            began, began_own = time.perf_counter(), time.process_time()
            apply(linear, array)
            seconds.append(time.perf_counter() - began)
            own.append(time.process_time() - began_own)
        slow = [f"{float(np.percentile(each, 95)) * 1e3:.3g}" for each in (own, seconds)]
        shape = f"{channels} × {side} × {side}"
        rows.append([name, shape, milliseconds(own), slow[0], milliseconds(seconds), slow[1]])
    header = ("latents of 1024 px", "shape", "of the processor: p50, ms", "p95", "wall: p50, ms", "p95")
    return table(header, rows)


@dataclass(frozen=True)
class Flood:
    """Clients that ask for linear previews as fast as they are answered, and what they were told."""

    url: str
    body: bytes
    clients: int
    waits: bool  # as long as Retry-After says
    told: Counter[int] = field(default_factory=Counter)
    computes: list[float] = field(default_factory=list)

    async def run(self) -> None:
        """Until it is cancelled."""
        async with httpx.AsyncClient(timeout=None, trust_env=False) as http:
            await asyncio.gather(*(self._one(http) for _ in range(self.clients)))

    async def _one(self, http: httpx.AsyncClient) -> None:
        while True:
            answer = await http.post(f"{self.url}/decode", params=LINEAR, content=self.body)
            self.told[answer.status_code] += 1
            if found := re.search(r"compute;dur=([\d.]+)", answer.headers.get("server-timing", "")):
                self.computes.append(float(found[1]))
            if self.waits and answer.status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))


async def spinning() -> None:
    """Takes a core as clients do, and asks for nothing: until it is cancelled."""
    while True:
        end = time.perf_counter() + 0.005
        while time.perf_counter() < end:
            pass
        await asyncio.sleep(0)


async def decodes(http: httpx.AsyncClient, url: str, body: bytes, count: int) -> float:
    """The median of so many, in seconds."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await http.post(f"{url}/decode", params=FULL, content=body)
        answer.raise_for_status()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


async def beside(http: httpx.AsyncClient, url: str, pixels: int, rounds: int, count: int, clients: int) -> str:
    """Full decodes alone, beside the floods, and beside clients that take a core and ask for nothing."""
    rng = random.Random(0)
    body, small = npy(latent(rng, pixels)), npy(latent(rng, 1024))
    keeps, ignores = (Flood(url, small, clients, waits) for waits in (True, False))
    ways: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "nothing": asyncio.Event().wait,
        "previews, Retry-After kept": keeps.run,
        "previews, Retry-After ignored": ignores.run,
        "a busy core, no request": spinning,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    await decodes(http, url, body, 2)
    names = list(ways)
    for _ in range(rounds):
        for way in names:
            task = asyncio.ensure_future(ways[way]())
            seconds[way].append(await decodes(http, url, body, count))
            task.cancel()
            await asyncio.wait([task])
        names.reverse()
    alone = seconds["nothing"]
    rows = []
    for (way, each), flood in zip(seconds.items(), (None, keeps, ignores, None), strict=True):
        ratio = median(b / a for a, b in zip(alone, each, strict=True))
        told = [str(flood.told[status]) if flood else "" for status in (200, 429)]
        rows.append([way, milliseconds(each), f"×{ratio:.2f}", *told])
    computes = [*keeps.computes, *ignores.computes]
    slow = float(np.percentile(computes, 95))
    said = f"The service's own word on the map's compute: p50 {median(computes):.1f} ms, p95 {slow:.1f} ms."
    head = (f"beside a decode of {pixels} px", "p50, ms", "/ alone", "previews answered", "dropped")
    return f"{table(head, rows)}\n\n{said}"


async def one_by_one(http: httpx.AsyncClient, url: str, rounds: int) -> str:
    """Previews of 1024 px alone, from the request to the picture, beside a full decode of the same latent."""
    body = npy(latent(random.Random(0), 1024))
    ways: dict[str, dict[str, str]] = {
        "latentd-small, linear": LINEAR,
        "taesd, tiny": {"model": "taesd", "preview": "tiny"},
        "latentd-small, full": FULL,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    dropped: Counter[str] = Counter()
    for turn in range(rounds + 1):
        for way, params in ways.items():
            began = time.perf_counter()
            answer = await http.post(f"{url}/decode", params=params, content=body)
            if turn and answer.status_code == 429:
                dropped[way] += 1
            elif turn:  # the first one loads
                answer.raise_for_status()
                seconds[way].append(time.perf_counter() - began)
    rows = [
        [way, milliseconds(each) if each else "–", f"{max(each, default=0) * 1e3:.3g}", str(dropped[way])]
        for way, each in seconds.items()
    ]
    return table(("1024 px", "p50, ms", "slowest, ms", "dropped"), rows)


@dataclass
class Shown:
    """What came of a stream."""

    sent: dict[str, float]  # when, by request
    seen: dict[str, float]  # in the order of the parts

    def row(self, pace: str, seconds: float) -> list[str]:
        """For the table."""
        waits = [at - self.sent[name] for name, at in self.seen.items()]
        order = [list(self.sent).index(name) for name in self.seen]
        newest = order == sorted(order) and list(self.seen)[-1] == list(self.sent)[-1]
        slow = float(np.percentile(waits, 95)) * 1e3
        rates = [f"{len(each) / seconds:.1f}" for each in (self.sent, self.seen)]
        return [pace, *rates, milliseconds(waits), f"{slow:.3g}", "yes" if newest else "NO"]


async def streamed(http: httpx.AsyncClient, url: str, pace: float | None, seconds: float) -> Shown:
    """Latents of 1024 px to a stream, so many a second or as many as are taken; and what was shown of them."""
    body = npy(latent(random.Random(0), 1024))
    shown, name = Shown({}, {}), f"pace-{pace}"

    async def look_on(answer: httpx.Response) -> None:
        rest = b""
        async for data in answer.aiter_raw():
            now = time.perf_counter()
            *heads, rest = re.split(rb"(X-Request-Id: \S+\r\n)", rest + data)
            for head in heads[1::2]:
                shown.seen.setdefault(head.split()[1].decode(), now)  # the last one is sent twice

    async with http.stream("GET", f"{url}/preview/stream", params={"stream": name}) as answer:
        looking = asyncio.ensure_future(look_on(answer))
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            step = f"{name}-{len(shown.sent)}"
            shown.sent[step] = now
            params, headers = LINEAR | {"stream": name}, {"X-Request-Id": step}
            taken = await http.post(f"{url}/preview/stream", params=params, content=body, headers=headers)
            if taken.status_code != 202:
                del shown.sent[step]
            if pace is not None:
                await asyncio.sleep(max(0.0, began + len(shown.sent) / pace - time.perf_counter()))
        await asyncio.sleep(1.0)
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
    return shown


async def served(pixels: int, rounds: int, count: int, clients: int) -> None:
    """All that needs the service."""
    with tempfile.TemporaryDirectory() as name:
        (models := Path(name) / "models").mkdir()
        shutil.copy(EMBEDDED, models)
        write(models / "taesd.safetensors", state_of("taesd", width=64))
        async with (
            service(models, Path(name) / "log") as (url, _),
            httpx.AsyncClient(timeout=None, trust_env=False) as http,
        ):
            small = npy(latent(random.Random(0), 1024))
            while (await http.post(f"{url}/decode", params=LINEAR, content=small)).status_code == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.5)  # its map is being fitted
            print(await one_by_one(http, url, rounds), "\n")
            rows = []
            for pace in (5.0, 20.0, None):
                found = await streamed(http, url, pace, 5.0)
                rows.append(found.row("as many as are taken" if pace is None else f"{pace:g} a second", 5.0))
            head = ("latents come", "sent a second", "shown a second", "p50, ms", "p95, ms", "newest shown")
            print(table(head, rows), "\n")
            print(await beside(http, url, pixels, rounds, count, clients))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pixels", type=int, default=512, help="side of the full decodes")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--decodes", type=int, default=6, help="in each half of a round")
    options.add_argument("--clients", type=int, default=4, help="that ask for previews")
    args = options.parse_args()
    print(f"{processor()}, numpy {np.__version__}, {args.rounds} rounds\n")
    print(alone(500), "\n")
    asyncio.run(served(args.pixels, args.rounds, args.decodes, args.clients))


if __name__ == "__main__":
    main()
