"""Several replicas on Ray Serve, on loopback: six models in bursts, by three ways of routing, and a replica killed.

`python -m benchmarks.scaleout --replicas 2` (`make ray` runs it with 2 and 4, in a network namespace: Ray listens on
all interfaces). Each way of routing has replicas of its own; ours, Ray's round robin and Ray's power of two choices
take turns. Then a replica of each dies in the middle of a round, and every request must have its answer all the same.
The same requests go through `benchmarks.fleet`, with what batches and loads took here. One table, and JSON.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve._private.constants import DEFAULT_REQUEST_ROUTER_PATH
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

from app.settings import Settings
from app.store.checkpoint import Checkpoint
from benchmarks.calls import latent, npy
from benchmarks.doors import listening
from benchmarks.fleet import POLICIES, REPORT_SECONDS, Policy
from benchmarks.measured import Done, Round
from benchmarks.scaleout_table import Asked, lines, summary
from benchmarks.trace import Ask, bursts
from deploy.ingress import ReplicaDied, Replicas, create_ingress
from deploy.ray_serve import Replica, application, door_of, replicas_of, start_ray
from deploy.replica import Answer, Call
from deploy.router import ResidentRouter
from deploy.routing import load_seconds
from tests.store.weights import state_of, write

MODELS = {name: 1 / (index + 1) for index, name in enumerate("abcdef")}
"""Six, each asked for less than the one before: Zipf's law."""

SIDE = 32
WIDTHS = {"encoder_widths": (384,) * 4, "decoder_widths": (64,) * 4}
"""A decode takes tens of ms of a core; the half that it does not use makes a load several times as long, as usual."""

RESIDENT = {2: 3, 4: 2}
"""Models that a replica has room for, by the number of replicas: all six fit, and no replica holds them all."""

ROUTERS: dict[Policy, type[RequestRouter] | str] = {
    "resident": ResidentRouter,
    "round robin": RoundRobinRouter,
    "two choices": DEFAULT_REQUEST_ROUTER_PATH,
}


class Watched(Replica):
    """A replica that can be told to begin anew, and killed."""

    async def warm(self, body: bytes) -> None:
        """Lets torch set itself up, measures a load, and forgets the models."""
        for model in list(MODELS)[:2]:
            await self.answer(Call("POST", "/decode", b"model=" + model.encode(), [], body, model))
        await self.empty()

    async def empty(self) -> None:
        """Evicts everything."""
        engine = self._service.engine
        for entry in engine.store.entries():
            assert isinstance(entry, Checkpoint)
            engine.unload(entry)

    async def load_seconds(self) -> float | None:
        """That a load takes, as it tells routers."""
        return self._service.loads.seconds()

    async def process(self) -> tuple[int, int]:
        """Its process, and how many requests it has."""
        return os.getpid(), self._service.engine.open_requests


FOUND_SECONDS = 300.0
"""Until a handle knows of replicas that run: it is told by Ray's controller, which a busy machine keeps waiting."""


async def found_by(handle: DeploymentHandle[Any], replicas: int) -> None:
    """Waits until a handle reaches so many. Raises TimeoutError."""
    async with asyncio.timeout(FOUND_SECONDS):
        while True:
            with suppress(DeploymentUnavailableError):  # it knows of none
                if len(await handle.broadcast("process").results_async()) == replicas:
                    return
            await asyncio.sleep(REPORT_SECONDS)


class Bench:
    """An application of each way of routing, a door before each, and a client."""

    def __init__(self, http: httpx.AsyncClient, body: bytes) -> None:
        self.http, self.body = http, body
        self.handles: dict[Policy, Any] = {}
        self.urls: dict[Policy, str] = {}
        self.deaths: Counter[Policy] = Counter()

    async def round(self, policy: Policy, asks: Sequence[Ask], kill_at: float | None = None) -> Round:
        """Sends the trace, each request at its time, however the others fare; at `kill_at` a replica is killed."""
        began, died = time.monotonic(), self.deaths[policy]
        work = [asyncio.ensure_future(self._ask(policy, ask, began)) for ask in asks]
        if kill_at is not None:
            await asyncio.sleep(kill_at)
            await self._kill(policy)
        return Round(list(await asyncio.gather(*work)), self.deaths[policy] - died)

    async def _ask(self, policy: Policy, ask: Ask, began: float) -> Done:
        await asyncio.sleep(max(0.0, began + ask.at - time.monotonic()))
        sent = time.monotonic()
        answer = await self.http.post(f"{self.urls[policy]}/decode", params={"model": ask.model}, content=self.body)
        seconds = time.monotonic() - sent
        timing = answer.headers.get("server-timing", "")
        stages = {name: float(ms) / 1000 for name, ms in re.findall(r"(\w+);dur=([\d.]+)", timing)}
        return Done(ask.model, answer.status_code, sent - began, seconds, answer.headers.get("x-replica", ""), stages)

    async def _kill(self, policy: Policy) -> None:
        """SIGKILL to the replica that has most to do, once any has several requests."""
        requests = 0
        while requests < 2:
            await asyncio.sleep(0.02)
            found = await self.handles[policy].broadcast("process").results_async(timeout_s=30)
            process, requests = max(found, key=lambda each: each[1])
        os.kill(process, signal.SIGKILL)

    def counting(self, policy: Policy, replicas: Replicas) -> Replicas:
        """The same, counting the tries that a replica's death ended."""

        async def answer(call: Call) -> Answer:
            try:
                return await replicas.answer(call)
            except ReplicaDied:
                self.deaths[policy] += 1
                raise

        return Replicas(answer, replicas.metrics)


@asynccontextmanager
async def door(bench: Bench, policy: Policy, settings: Settings) -> AsyncIterator[None]:
    """Serves one application's door."""
    app = create_ingress(bench.counting(policy, replicas_of(bench.handles[policy])), door_of(settings))
    async with listening(app) as bench.urls[policy]:
        yield


async def measure(
    bench: Bench, rounds: int, seconds: float, rate: float
) -> tuple[dict[Policy, list[Round]], dict[Policy, Round]]:
    """Rounds in turns, each from empty replicas; then one of each way in which a replica is killed."""
    found: dict[Policy, list[Round]] = defaultdict(list)
    for policy in POLICIES:
        await bench.handles[policy].broadcast("warm", bench.body).results_async()
    for index in range(rounds):
        asks = bursts(seconds, rate, MODELS, seed=index)
        for policy in POLICIES[index % len(POLICIES) :] + POLICIES[: index % len(POLICIES)]:
            await bench.handles[policy].broadcast("empty").results_async()
            await asyncio.sleep(4 * REPORT_SECONDS)  # until the routers know
            told = await bench.handles[policy].broadcast("load_seconds").results_async()
            found[policy].append(replace(await bench.round(policy, asks), load=load_seconds(told)))
    asks = bursts(seconds, rate, MODELS, seed=rounds)
    killed = {policy: await bench.round(policy, asks, kill_at=seconds / 2) for policy in POLICIES}
    return found, killed


async def run(args: argparse.Namespace, models: Path) -> dict[str, Any]:
    """Everything but Ray's start and end."""
    size = (models / "a.safetensors").stat().st_size
    settings = Settings(
        models=(models,), device="cpu", cache_bytes=round(size * (RESIDENT[args.replicas] + 0.5)), buffer_bytes=64 << 20
    )
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as http:
        bench = Bench(http, npy(latent(rng, SIDE)))
        async with AsyncExitStack() as doors:
            for policy in POLICIES:
                app = application(
                    settings, (args.replicas, args.replicas), cpus=1, replica=Watched, router=ROUTERS[policy]
                )
                bench.handles[policy] = await asyncio.to_thread(
                    serve.run, app, name=policy.replace(" ", "-"), route_prefix=None
                )
                await found_by(bench.handles[policy], args.replicas)
                await doors.enter_async_context(door(bench, policy, settings))
            found, killed = await measure(bench, args.rounds, args.seconds, args.rate)
    asked = Asked(args.replicas, RESIDENT[args.replicas], MODELS, args.seconds, args.rate)
    return summary(found, killed, asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, choices=sorted(RESIDENT), default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of each way of routing; default %(default)s")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a round; default %(default)s")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second; default %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        for seed, name in enumerate(MODELS):
            write(Path(folder) / "models" / f"{name}.safetensors", state_of("sd1", seed, **WIDTHS))
        start_ray(cpus=len(POLICIES) * args.replicas + 1, gpus=0, store_bytes=100 << 20, logs=False)
        serve.start(proxy_location="Disabled")
        try:
            told = asyncio.run(run(args, Path(folder) / "models"))
        finally:
            serve.shutdown()
            ray.shutdown()
    print("\n".join(lines(told)))
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if any(set(one["statuses"]) != {200} for one in told["killed"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
