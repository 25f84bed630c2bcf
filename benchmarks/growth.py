"""How time and memory grow: `python -m benchmarks.growth` measures, and draws docs/growth.png from what it measured.

Against the pixels of a picture, the clients at once and the models behind a cache of four. Time is the processor's, of
one thread for the networks and of the whole service for the rest, so that others on the machine move it little. With
`--cold` it tells what the first request costs instead: after the start, of a model, of a size.
"""

import argparse
import asyncio
import datetime
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import torch

from app.allocator import keep_pages
from app.engine import compute
from app.engine.forecast import Forecaster, network_shape
from app.engine.jobs import Task
from app.engine.planning import ExecutionPlan
from app.store.checkpoint import load_autoencoder
from app.store.store import open_checkpoint
from app.terms import ExecutionName
from benchmarks.calls import latent, npy
from benchmarks.cpu import processor
from benchmarks.forecast import Allocated
from benchmarks.load import service
from benchmarks.overhead import own_seconds
from benchmarks.pairs import table
from benchmarks.peer import NETWORKS, Network, peer
from tests.store.weights import state_of, write

Point = tuple[float, float]
MEASURED: dict[Network, tuple[int, ...]] = {"tiny": (256, 512, 1024, 2048), "kl": (256, 512)}
FORECAST = (256, 512, 1024, 2048, 4096)
CLIENTS = (1, 4, 16, 64, 256)
MODELS = (1, 2, 4, 8, 16, 50)
CACHED = 4
SMALL = 64  # pixels of a side, where not the network is what is measured
FILES: dict[Network, str] = {"tiny": "taesd", "kl": "sd1"}


@torch.inference_mode()
def one(path: Path, side: int) -> Point:
    """Of a decode in this process, on one thread: processor seconds, the better of two, and bytes allocated at most."""
    torch.set_num_threads(1)
    keep_pages()
    checkpoint = open_checkpoint(path, "sd1")
    module = load_autoencoder(checkpoint, torch.float32, torch.device("cpu"))

    def run(side: int) -> float:
        item = torch.from_numpy(latent(random.Random(0), side)[0])
        began = time.process_time()
        plan = ExecutionPlan("fp32", "whole", 1)
        compute.forward(module, [item], [Task("decode", checkpoint)], plan, lambda: None)
        return time.process_time() - began

    run(SMALL)
    with Allocated() as allocated:
        run(side)
    return min(run(side) for _ in range(2 if side < max(FORECAST) // 2 else 1)), allocated.peak


def pixels(folder: Path) -> dict[str, Any]:
    """By network: what was measured, in processes of their own, and what is forecast for each execution."""
    found: dict[str, Any] = {}
    for network, sides in MEASURED.items():
        path = folder / f"{FILES[network]}.safetensors"
        write(path, peer(network).state_dict())
        checkpoint, forecaster = open_checkpoint(path, "sd1"), Forecaster("cpu")
        seconds, allocated = [], []
        for side in sides:
            command = [sys.executable, "-m", "benchmarks.growth", "--one", str(path), "--side", str(side)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            seconds.append((side, float(answer[0])))
            allocated.append((side, float(answer[1])))
            print(NETWORKS[network], side, *answer, flush=True)
        forecasts = {
            name: [
                (side, forecaster.peak(network_shape(checkpoint, "decode", side, side), ExecutionPlan("fp32", name, 1)))
                for side in FORECAST
            ]
            for name in get_args(ExecutionName)
        }
        found[NETWORKS[network]] = {"seconds": seconds, "allocated": allocated, "forecast": forecasts}
    return found


async def asked(url: str, paths: list[str], clients: int) -> None:
    """Sends a small decode to each path, from so many clients at once."""
    body, rest = npy(latent(random.Random(0), SMALL)), iter(paths)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as http:

        async def client() -> None:
            for path in rest:
                (await http.post(url + path, content=body)).raise_for_status()

        await asyncio.gather(*(client() for _ in range(clients)))


def resident(pid: int) -> int:
    """Bytes of a process's pages."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


async def clients(folder: Path) -> dict[str, list[Point]]:
    """Processor seconds of a request, and the service's pages, by clients at once."""
    write(folder / "tiny.safetensors", state_of("taesd"))
    seconds: list[Point] = []
    memory: list[Point] = []
    async with service(folder, folder.parent / "log", queue_size="512") as (url, process):
        await asked(url, ["/decode"] * 32, 4)
        for many in CLIENTS:
            began = own_seconds(process.pid)
            await asked(url, ["/decode"] * 512, many)
            seconds.append((many, (own_seconds(process.pid) - began) / 512))
            memory.append((many, resident(process.pid)))
            print("clients", many, seconds[-1][1], memory[-1][1], flush=True)
    return {"seconds": seconds, "resident": memory}


async def models(folder: Path) -> dict[str, list[Point]]:
    """Processor seconds of a request, and the service's pages, by models that take turns behind a cache of four."""
    for index in range(max(MODELS)):
        write(folder / f"m{index}.safetensors", state_of("sd1", seed=index))
    nbytes = open_checkpoint(folder / "m0.safetensors", "sd1").weight_bytes(torch.float32)
    seconds: list[Point] = []
    memory: list[Point] = []
    async with service(folder, folder.parent / "log", cache_bytes=str(CACHED * nbytes)) as (url, process):
        await asked(url, [f"/decode?model=m{index}" for index in range(max(MODELS))], 1)
        for many in MODELS:
            paths = [f"/decode?model=m{index % many}" for index in range(200)]
            began = own_seconds(process.pid)
            await asked(url, paths, 1)
            seconds.append((many, (own_seconds(process.pid) - began) / len(paths)))
            memory.append((many, resident(process.pid)))
            print("models", many, seconds[-1][1], memory[-1][1], flush=True)
    return {"seconds": seconds, "resident": memory}


async def cold(folder: Path) -> list[list[str]]:
    """Rows of milliseconds, the clock's and the service's processor's: the first of each kind, and the ones after."""
    for network, name in FILES.items():
        write(folder / f"{name}.safetensors", peer(network).state_dict())
    rows = []
    async with service(folder, folder.parent / "log") as (url, process), httpx.AsyncClient(timeout=600) as http:

        async def timed(what: str, model: str, side: int) -> None:
            body = npy(latent(random.Random(0), side))
            began, own = time.perf_counter(), own_seconds(process.pid)
            answer = await http.post(f"{url}/decode", params={"model": model}, content=body)
            wall, own = time.perf_counter() - began, own_seconds(process.pid) - own
            answer.raise_for_status()
            rows.append([what, model, str(side), f"{wall * 1e3:.0f}", f"{own * 1e3:.0f}"])

        for model in FILES.values():
            await timed("the first of a model" if rows else "the first of all", model, 128)
            await timed("the next", model, 128)
            await asyncio.sleep(5)  # what is counted in the background after a load
            await timed("the first of a size", model, 192)
            await timed("the next", model, 192)
    return rows


def draw(found: dict[str, Any], path: Path) -> None:
    """Both axes in powers, so that what grows in proportion is a line of one slope."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    lines = {"whole": "-", "strips": "--", "recompute": ":"}
    for colour, (network, each) in zip(("#1f77b4", "#d62728"), found["pixels"].items(), strict=True):
        sides, seconds = np.array(each["seconds"]).T
        axes[0, 0].plot(sides**2 / 1e6, seconds, "o-", color=colour, label=network)
        for name, points in each["forecast"].items():
            sides, values = np.array(points).T
            axes[1, 0].plot(sides**2 / 1e6, values / 1e9, lines[name], color=colour, label=f"{network} {name}")
        sides, values = np.array(each["allocated"]).T
        axes[1, 0].plot(sides**2 / 1e6, values / 1e9, "x", color=colour)
    for column, key, what in ((1, "clients", "clients at once"), (2, "models", f"models, {CACHED} in the cache")):
        many, seconds = np.array(found[key]["seconds"]).T
        axes[0, column].plot(many, seconds * 1e3, "o-", color="#444444")
        many, values = np.array(found[key]["resident"]).T
        axes[1, column].plot(many, values / 1e6, "o-", color="#444444")
        axes[0, column].set(xscale="log", xlabel=what, ylabel="processor, ms a request", ylim=(0, 1100 * max(seconds)))
        axes[1, column].set(
            xscale="log", xlabel=what, ylabel="pages of the service, MB", ylim=(0, 1.1e-6 * max(values))
        )
        for axis in axes[:, column]:
            axis.set_xticks(many, labels=[f"{each:.0f}" for each in many], minor=False)
            axis.set_xticks([], minor=True)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="megapixels", ylabel="decode, fp32, one thread: processor, s")
    axes[1, 0].set(xscale="log", yscale="log", xlabel="megapixels", ylabel="working memory, GB; x: allocated, whole")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("growth.json"), help="what was measured; default %(default)s")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/growth.png"))
    parser.add_argument("--parts", nargs="*", choices=["pixels", "clients", "models"], default=None)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*one(args.one, args.side))
        return
    print(f"{datetime.date.today()}, {processor()}, torch {torch.__version__}\n")
    if args.cold:
        with tempfile.TemporaryDirectory() as name:
            (folder := Path(name) / "models").mkdir()
            rows = asyncio.run(cold(folder))
        print(table(("", "model", "px", "ms", "of the processor, ms"), rows))
        return
    measures: dict[str, Callable[[Path], Any]] = {
        "pixels": pixels,
        "clients": lambda folder: asyncio.run(clients(folder)),
        "models": lambda folder: asyncio.run(models(folder)),
    }
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    for part in measures if args.parts is None else args.parts:
        with tempfile.TemporaryDirectory() as name:
            (folder := Path(name) / "models").mkdir()
            found[part] = measures[part](folder)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.output)


if __name__ == "__main__":
    main()
