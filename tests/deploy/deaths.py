"""`make ray`: replicas of Ray Serve that die while they have requests, at each stage of one; nothing may be lost.

`python -m tests.deploy.deaths`, in a network namespace as `make ray` has one. Two replicas behind the door, a burst of
requests for three models, and the replica with most of them dies: SIGKILL while they are queued, while a model is
loaded, while a batch is computed, when an answer is there and not sent; and by itself, its device being lost. Each
answer must be the picture that it was before. Then a replica is stopped in the middle (SIGSTOP), and new requests must
pass it by; and all are killed at once. Prints a table; status 1: something was lost.
"""

import asyncio
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.settings import Settings
from benchmarks.calls import latent, npy
from benchmarks.doors import listening
from benchmarks.scaleout import found_by
from deploy.ingress import ReplicaDied, Replicas, create_ingress
from deploy.ray_serve import Replica, application, door_of, replicas_of, start_ray
from deploy.replica import Answer, Call
from deploy.routing import SILENT_SECONDS
from tests.store.weights import state_of, write

MODELS = "abc"
SIDE = 32
WIDTHS = {"encoder_widths": (384,) * 4, "decoder_widths": (64,) * 4}
REPLICAS = 2
BODIES = [(index, npy(latent(random.Random(index), SIDE))) for index in range(12)]
PATIENCE_SECONDS = 300.0
LEVELS = 1
"""A batch of other pictures rounds otherwise."""
LOOK_SECONDS = 0.001
STAGES = ("queued", "loading", "computing", "answering", "device lost")


class Doomed(Replica):
    """A replica that can be told when to die."""

    _ends_answers = False

    async def process(self) -> int:
        """Its process."""
        return os.getpid()

    async def forget(self) -> None:
        """Evicts everything: the next request for each model loads it."""
        engine = self._service.engine
        for name in MODELS:
            engine.unload(await engine.resolve(name))

    async def die_at(self, stage: str, process: int) -> None:
        """If it is this process: ends when a request comes to that stage."""
        if process != os.getpid():
            return
        worker = self._service.engine.workers[0]
        match stage:
            case "queued":
                self._when(lambda: worker.batcher.items > 1, _killed)
            case "loading":
                worker._load_module = _killed
            case "computing":
                self._when(lambda: worker.busy, _killed)
            case "answering":
                self._ends_answers = True
            case "device lost":
                self._when(lambda: worker.busy, lambda: setattr(worker.thread, "lost", "a test says so"))

    async def answer(self, call: Call) -> Answer:
        """As ever, unless it is to die then."""
        answer = await super().answer(call)
        if self._ends_answers:
            _killed()
        return answer

    def _when(self, true: Callable[[], bool], do: Callable[[], object]) -> None:
        async def look() -> None:
            while not true():  # noqa: ASYNC110  the engine tells nobody
                await asyncio.sleep(LOOK_SECONDS)
            do()

        self._looking = asyncio.create_task(look())


def _killed(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Fleet:
    """The replicas, their door, and a client of it."""

    handle: DeploymentHandle[Any]
    http: httpx.AsyncClient
    died: Counter[str] = field(default_factory=Counter)  # under a request, by the line of the table
    line: str = ""
    right: list[np.ndarray] = field(default_factory=list)

    def replicas(self) -> Replicas:
        """What reaches them, counting the tries that a death ended."""
        reached = replicas_of(self.handle)

        async def answer(call: Call) -> Answer:
            try:
                return await reached.answer(call)
            except ReplicaDied:
                self.died[self.line] += 1
                raise

        return Replicas(answer, reached.metrics)

    async def processes(self) -> list[int]:
        """Of all replicas, once there are as many as there should be."""
        await found_by(self.handle, REPLICAS)
        found: list[int] = await self.handle.broadcast("process").results_async()
        return found

    async def burst(self) -> list[httpx.Response]:
        """Several latents to each model, all at once."""
        asks = [self.http.post("/decode", params={"model": MODELS[i % len(MODELS)]}, content=b) for i, b in BODIES]
        return list(await asyncio.gather(*asks))

    async def told(self, line: str, burst: Awaitable[list[httpx.Response]]) -> int:
        """Prints a line of what became of a burst; how many were not answered with their picture."""
        self.line, began = line, time.monotonic()
        answers = await burst
        right = sum(map(_is, answers, self.right))
        figures = f"{len(answers):8}  {right:5}  {self.died[line]:11}  {time.monotonic() - began:7.1f}"
        print(f"{line:32} {figures}  {dict(Counter(each.status_code for each in answers))}", flush=True)
        return len(answers) - right


def _is(answer: httpx.Response, right: np.ndarray) -> bool:
    return answer.status_code == 200 and bool(np.abs(_pixels(answer) - right).max() <= LEVELS)


def _pixels(answer: httpx.Response) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)


async def lost(fleet: Fleet) -> int:
    """Requests that were not answered."""
    await fleet.processes()
    fleet.right = [_pixels(answer) for answer in await fleet.burst()]
    count = 0
    print(f"{'it dies':32} requests  right  tried again  seconds")
    for stage in STAGES:
        doomed, _ = await fleet.processes()
        await fleet.handle.broadcast("forget").results_async()
        await fleet.handle.broadcast("die_at", stage, doomed).results_async()
        count += await fleet.told(stage, fleet.burst())
        if doomed in await fleet.processes():
            raise RuntimeError(f"{stage}: the replica was to die and has not")
    return count + await _stopped(fleet) + await _all(fleet)


async def _stopped(fleet: Fleet) -> int:
    """One hangs with requests; what comes later passes it by, and what it has runs elsewhere once Ray gives it up."""
    stopped, _ = await fleet.processes()
    os.kill(stopped, signal.SIGSTOP)
    first = asyncio.ensure_future(fleet.told("hangs (SIGSTOP): requests of then", fleet.burst()))
    await asyncio.sleep(SILENT_SECONDS + 2)
    later = await fleet.told("hangs: 5 s later", fleet.burst())
    return later + await first


async def _all(fleet: Fleet) -> int:
    """Both are killed with requests; they run on those that Ray starts."""
    found = await fleet.processes()
    burst = asyncio.ensure_future(fleet.told("both are killed", fleet.burst()))
    await asyncio.sleep(0.2)
    for process in found:
        os.kill(process, signal.SIGKILL)
    return await burst


async def run(models: Path) -> int:
    """All but Ray's start and end."""
    settings = Settings(models=(models,), device="cpu", buffer_bytes=64 << 20)
    app = application(settings, (REPLICAS, REPLICAS), replica=Doomed)
    handle = await asyncio.to_thread(serve.run, app, name="deaths", route_prefix=None)
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, trust_env=False) as http:
        fleet = Fleet(handle, http)
        async with listening(create_ingress(fleet.replicas(), door_of(settings))) as url:
            http.base_url = httpx.URL(url)
            return await lost(fleet)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        for seed, name in enumerate(MODELS):
            write(Path(folder) / f"{name}.safetensors", state_of("sd1", seed, **WIDTHS))
        start_ray(cpus=REPLICAS + 1, gpus=0, store_bytes=100 << 20, logs=False)
        serve.start(proxy_location="Disabled")
        try:
            count = asyncio.run(run(Path(folder)))
        finally:
            serve.shutdown()
            ray.shutdown()
    print(f"{count} requests were lost" if count else "nothing was lost")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
