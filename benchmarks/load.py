"""A bounded load on the real service, on loopback: mixed models, sizes and operations, bad bodies, impatient clients.

`python -m benchmarks.load` starts the service with small random models, sends it requests from one seed, and checks
that every request ends as 200 or an honest 4xx or 5xx, that results equal those of lone requests, that the metrics add
up, and that a SIGTERM under load loses nothing that was accepted. Exit status 1 where any of this does not hold.
"""

import argparse
import asyncio
import io
import os
import random
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.calls import MODELS, Call, array_of, calls, latent, npy, write_models

READY_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 300.0, 60.0, 300.0
SAMPLES = 12
LEVELS = 1  # of 255, that a decoded picture may differ by from a lone run's: float32 sums in another order


@dataclass
class Report:
    """What happened, and what should not have."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    compared: int = 0
    drained: int = 0
    wall: float = 0.0
    problems: list[str] = field(default_factory=list)


@asynccontextmanager
async def service(models: Path, log: Path, module: str = "app", **settings: str) -> AsyncIterator[tuple[str, Process]]:
    """The real service on a free port, ready; its address and process. Gone afterwards, whatever happens."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTD_")}
    environment |= {f"LATENTD_{name.upper()}": value for name, value in settings.items()}
    command = ["-m", module, "serve", "--host", "127.0.0.1", "--models", str(models), "--device", "cpu", "--port"]
    async with listening(command, log, environment) as found:
        yield found


@asynccontextmanager
async def listening(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> AsyncIterator[tuple[str, Process]]:
    """A Python program that is told a free port behind its command, once it is ready; its address and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *command, str(port)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(READY_SECONDS):
            while not await _ready(http, url):
                if process.returncode is not None:
                    raise RuntimeError(f"the service ended with status {process.returncode}")
        yield url, process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()


async def _ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/healthz/ready")).status_code == 200
    except httpx.TransportError:
        await asyncio.sleep(0.1)
        return False


def client(connections: int) -> httpx.AsyncClient:
    """One connection a request: which requests the service had taken is then plain when it stops."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=limits, trust_env=False)


async def send(http: httpx.AsyncClient, url: str, call: Call) -> httpx.Response | None:
    """The answer; None where the client did not wait for it."""
    headers = {"X-Request-Timeout-Ms": "20"} if call.kind == "late" else {}
    request = http.post(f"{url}/{call.op}", params=call.query, content=call.body, headers=headers)
    try:
        return await asyncio.wait_for(request, call.patience)
    except TimeoutError:
        return None


async def load(url: str, work: list[Call], concurrency: int, report: Report) -> list[tuple[Call, httpx.Response]]:
    """Sends all, `concurrency` at a time; the answers of 200."""
    room = asyncio.Semaphore(concurrency)
    good = []

    async def one(http: httpx.AsyncClient, call: Call) -> None:
        async with room:
            started = time.monotonic()
            try:
                answer = await send(http, url, call)
            except httpx.TransportError as error:
                report.problems.append(f"{call.kind} {call.op}: no answer, {error!r}")
                return
            if answer is None:
                report.statuses["left"] += 1
                return
            report.statuses[str(answer.status_code)] += 1
            if answer.status_code not in call.expected:
                report.problems.append(f"{call.kind} {call.op} {call.query}: {answer.status_code} {answer.text[:200]}")
            if answer.status_code == 429 and int(answer.headers.get("retry-after", 0)) < 1:
                report.problems.append("a 429 without Retry-After")
            if answer.status_code == 200:
                report.seconds.append(time.monotonic() - started)
                good.append((call, answer))

    async with client(concurrency) as http:
        await asyncio.gather(*(one(http, call) for call in work))
    return good


async def compare(url: str, good: list[tuple[Call, httpx.Response]], rng: random.Random, report: Report) -> None:
    """Sends some of the requests again, one by one: the answers must be the same but for rounding."""
    async with client(1) as http:
        for call, before in rng.sample(good, min(SAMPLES, len(good))):
            after = await http.post(f"{url}/{call.op}", params=call.query, content=call.body)
            a, b = (array_of(call.op, answer.content) for answer in (before, after))
            if a.shape != b.shape:
                report.problems.append(f"{call.op} {call.query}: {a.shape} under load, {b.shape} alone")
                continue
            limit = LEVELS if call.op == "decode" else float(np.spacing(np.abs(b).max()))
            if call.query.get("deterministic"):
                limit = 0
            distance = float(np.abs(a.astype(float) - b).max())
            if distance > limit:
                report.problems.append(f"{call.op} {call.query}: {distance} from the lone run, more than {limit}")
            report.compared += 1


Sample = tuple[str, dict[str, str], float]


async def scrape(url: str) -> list[Sample]:
    """All samples of /metrics: (name without vae_, labels, value)."""
    async with client(1) as http:
        text = (await http.get(f"{url}/metrics")).text
    return [
        (sample.name.removeprefix("vae_"), sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def total(samples: list[Sample], name: str, **labels: str) -> int:
    """The sum of a metric over the samples that have these labels."""
    return int(sum(value for n, found, value in samples if n == name and labels.items() <= found.items()))


async def check_metrics(url: str, sent: int, report: Report) -> None:
    """Whether the service saw what the clients saw."""
    async with asyncio.timeout(ANSWER_SECONDS):
        # Requests whose clients have left may still be on their way out.
        while total(samples := await scrape(url), "requests_in_flight"):
            pass
    left = report.statuses["left"]
    counted = total(samples, "requests_total")
    if not sent - left <= counted <= sent:
        report.problems.append(f"{sent} requests were sent, {left} of them left; {counted} are counted")
    for status, seen in report.statuses.items():
        there = total(samples, "requests_total", status=status)
        if status != "left" and not seen <= there <= seen + left:
            report.problems.append(f"clients saw {seen} answers of {status}, the service {there}")
    items, sizes = total(samples, "batch_items_total"), total(samples, "batch_size_sum")
    if items != sizes or items < report.statuses["200"]:
        report.problems.append(f"{items} items in forwards, {sizes} by their sizes, {report.statuses['200']} answers")
    forwards = {
        total(samples, name) for name in ("batch_executions_total", "batch_size_count", "mode_executions_total")
    }
    if len(forwards) != 1:
        report.problems.append(f"the numbers of forwards differ: {forwards}")
    report.problems += [f"{name}{labels} is {value}" for name, labels, value in samples if value < 0]
    for name in ("queue_pixels", "queue_depth", "model_in_use"):
        if total(samples, name):
            report.problems.append(f"{name} is {total(samples, name)} with nothing to do")


async def drain(url: str, process: Process, rng: random.Random, count: int, report: Report) -> None:
    """SIGTERM while every request has been taken and many wait: each must have its whole answer."""
    work = [
        Call("good", "decode", {"model": rng.choice(list(MODELS))}, npy(latent(rng, 128)), frozenset({200}))
        for _ in range(count)
    ]
    before = total(await scrape(url), "requests_total")
    async with client(count) as http:
        sent = [asyncio.ensure_future(send(http, url, call)) for call in work]
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                samples = await scrape(url)
                inside = total(samples, "requests_in_flight")
                if inside + total(samples, "requests_total") - before >= count:
                    break
        process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*sent, return_exceptions=True)
    if not inside:
        report.problems.append("nothing was in flight any more when the service was told to stop")
    for answer in answers:
        if isinstance(answer, httpx.Response) and answer.status_code == 200:
            with Image.open(io.BytesIO(answer.content)) as image:
                image.load()
            report.drained += 1
        else:
            report.problems.append(f"lost in the drain: {answer!r}")
    status = await asyncio.wait_for(process.wait(), STOP_SECONDS)
    if status != 0:
        report.problems.append(f"the service ended with status {status} after its drain")


async def run(count: int, concurrency: int, seed: int, draining: int, queue_size: int = 64) -> Report:
    """The whole of it."""
    rng = random.Random(seed)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        write_models(models)
        log = Path(folder) / "log"
        async with service(models, log, queue_size=str(queue_size), drain_seconds="60") as (url, process):
            work = calls(count, rng)
            started = time.monotonic()
            good = await load(url, work, concurrency, report)
            report.wall = time.monotonic() - started
            await check_metrics(url, count, report)
            await compare(url, good, rng, report)
            await drain(url, process, rng, draining, report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--draining", type=int, default=24, help="requests in flight at the SIGTERM")
    parser.add_argument("--queue-size", type=int, default=28, help="of the service: small, so that it has to refuse")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.draining > args.queue_size:
        parser.error("--draining: more than --queue-size would be refused, not taken")
    report = asyncio.run(run(args.requests, args.concurrency, args.seed, args.draining, args.queue_size))
    print(f"{args.requests} requests, {args.concurrency} at a time, in {report.wall:.1f} s")
    print("statuses:", ", ".join(f"{status} x {count}" for status, count in sorted(report.statuses.items())))
    if len(report.seconds) > 1:
        cuts = quantiles(report.seconds, n=100)
        print(f"answers of 200: median {cuts[49] * 1e3:.0f} ms, 95 % within {cuts[94] * 1e3:.0f} ms")
    print(f"compared with lone runs: {report.compared}; answered during the drain: {report.drained}")
    for problem in report.problems:
        print("PROBLEM:", problem)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
