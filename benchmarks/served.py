"""What requests get of the network's own rate, beside the server that one writes in an afternoon.

`python -m benchmarks.served` decodes latents to PNG at 8 clients through the service and through the server of
`benchmarks.afternoon`, and runs the same forwards in a loop by themselves: each in a process of its own, idle while
another has its turn. What is compared is the median over the rounds of the ratios within a round.
"""

import argparse
import asyncio
import datetime
import http.client
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import torch

from app.allocator import keep_pages
from app.engine import compute
from app.engine.jobs import Task
from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.store.checkpoint import load_autoencoder
from app.store.store import open_checkpoint
from app.terms import Dtype
from benchmarks.calls import latent, npy
from benchmarks.cpu import processor
from benchmarks.load import listening, service
from benchmarks.overhead import own_seconds
from benchmarks.pairs import table
from benchmarks.peer import NETWORKS, Network, peer
from tests.store.weights import write

CLIENTS = 8
FAMILIES: dict[Network, str] = {"kl": "sd1", "tiny": "taesd"}
PRECISIONS: tuple[Dtype, ...] = ("fp32", "bf16")
HEADER = (
    "network",
    "px",
    "",
    "ours",
    "the loop",
    "afternoon fp32",
    "ours of the loop's rate",
    "ours / afternoon fp32",
    "ours / the same precision",
)
Rate = Callable[[], Coroutine[Any, Any, float]]
"""Pictures a second of one turn."""


def ask(url: str, path: str, body: bytes, count: int) -> None:
    """One client: so many requests, one after the other on one connection."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    for _ in range(count):
        connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200 or not content.startswith(b"\x89PNG"):
            raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
    connection.close()


async def served(clients: ThreadPoolExecutor, url: str, path: str, body: bytes, count: int) -> float:
    """Pictures a second of `CLIENTS` clients with `count` requests each."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    await asyncio.gather(*(loop.run_in_executor(clients, ask, url, path, body, count) for _ in range(CLIENTS)))
    return CLIENTS * count / (time.perf_counter() - began)


@torch.inference_mode()
def bare(path: Path, pixels: int) -> None:
    """The forwards alone, as the device's thread has them, arrays to pictures: `precision count` a line of stdin."""
    checkpoint = open_checkpoint(path, "sd1")
    item, task = torch.from_numpy(latent(random.Random(0), pixels)[0]), Task("decode", checkpoint)
    plans = {name: ExecutionPlan(name, "whole", 1) for name in PRECISIONS}
    cpu = torch.device("cpu")
    modules = {name: load_autoencoder(checkpoint, TORCH_DTYPES[name], cpu) for name in PRECISIONS}
    keep_pages()
    for line in sys.stdin:
        name, count = line.split()
        plan, module = next((plans[each], modules[each]) for each in PRECISIONS if each == name)
        began = time.perf_counter()
        for _ in range(int(count)):
            compute.forward(module, [item], [task], plan, lambda: None)
        print(int(count) / (time.perf_counter() - began), flush=True)


@asynccontextmanager
async def looping(
    path: Path, pixels: int
) -> AsyncIterator[tuple[Callable[[Dtype, int], Coroutine[Any, Any, float]], int]]:
    """`bare` in a process of its own: gives the rate of a number of forwards in a precision; and the process's id."""
    command = [sys.executable, "-m", "benchmarks.served", "--bare", str(path), "--pixels", str(pixels)]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    async def rate(precision: Dtype, count: int) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{precision} {count}\n".encode())
        return float(await process.stdout.readline())

    try:
        yield rate, process.pid
    finally:
        process.kill()
        await process.wait()


async def run(
    network: Network, pixels: int, rounds: int, count: int, peers: bool
) -> tuple[list[list[str]], list[list[str]]]:
    """A row for each precision: of pictures a second of the clock, and a second of the server's processor time."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "models" / f"{FAMILIES[network]}.safetensors"
        path.parent.mkdir()
        write(path, peer(network).state_dict())
        clients = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        url, ours = await stack.enter_async_context(service(path.parent, folder / "log"))
        loop, loop_pid = await stack.enter_async_context(looping(path, pixels))
        body = npy(latent(random.Random(0), pixels))
        theirs, peer_pid = "", 0
        if peers:
            command = ["-m", "benchmarks.afternoon", network]
            theirs, process = await stack.enter_async_context(listening(command, folder / "peer"))
            peer_pid = process.pid
        ways: dict[str, tuple[int, Rate]] = {}
        for precision in PRECISIONS:
            asked = f"/decode?precision={precision}"
            ways[f"ours {precision}"] = ours.pid, partial(served, clients, url, asked, body, count)
            ways[f"loop {precision}"] = loop_pid, partial(loop, precision, CLIENTS * count)
            if peers:
                ways[f"peer {precision}"] = peer_pid, partial(served, clients, theirs, asked, body, count)
        for precision in PRECISIONS:  # the first run of each sets libraries up
            await loop(precision, 1)
            for server in (url, theirs) if peers else (url,):
                await asyncio.to_thread(ask, server, f"/decode?precision={precision}", body, 1)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        own: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        for _ in range(rounds):
            for name in order:
                pid, turn = ways[name]
                before = own_seconds(pid)
                rates[name].append(await turn())
                own[name].append(CLIENTS * count / (own_seconds(pid) - before))
            order.reverse()
    of = [network_row(network, pixels, precision, found) for found in (rates, own) for precision in PRECISIONS]
    return of[: len(PRECISIONS)], of[len(PRECISIONS) :]


def network_row(network: Network, pixels: int, precision: Dtype, rates: dict[str, list[float]]) -> list[str]:
    """Medians of the rates, and of the rounds' ratios."""

    def of(name: str, other: str) -> str:
        if other not in rates:
            return ""
        return f"×{median(mine / its for mine, its in zip(rates[name], rates[other], strict=True)):.2f}"

    ours, loop = f"ours {precision}", f"loop {precision}"
    shown = [f"{median(rates[name]):.3g}" if name in rates else "" for name in (ours, loop, "peer fp32")]
    ratios = [of(ours, other) for other in (loop, "peer fp32", f"peer {precision}")]
    return [NETWORKS[network], str(pixels), precision, *shown, *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), default="tiny")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a turn; default %(default)s")
    parser.add_argument("--no-peers", action="store_true", help="the service and the loop alone")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # the loop's own process
    args = parser.parse_args()
    if args.bare:
        bare(args.bare, args.pixels)
        return
    clock, own = asyncio.run(run(args.network, args.pixels, args.rounds, args.requests, not args.no_peers))
    print(
        f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {version('diffusers')}, {CLIENTS} clients, {args.rounds} rounds, medians\n"
    )
    print("pictures a second\n\n" + table(HEADER, clock))
    print("\npictures a second of the process's own processor time\n\n" + table(HEADER, own))


if __name__ == "__main__":
    main()
