"""What previews cost: the linear map by itself, and full decodes with and without a flood of previews beside them.

`python -m benchmarks.previews` times the map on latents of 1024 px in this process; then it starts the service with the
embedded model and sends full decodes one after the other, in turns alone and beside clients that ask for linear
previews as fast as they are answered. What is compared is the median over the rounds of the ratio of their medians.
"""

import argparse
import asyncio
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx
import numpy as np

from app.engine.linear import apply
from app.store.linear import Linear
from benchmarks.calls import latent, npy
from benchmarks.cpu import processor
from benchmarks.load import service
from benchmarks.pairs import milliseconds, table

EMBEDDED = Path(__file__).resolve().parents[1] / "models" / "VAE" / "latentd-small.safetensors"
LATENTS = {"SD, SDXL": (4, 128, 1), "SD3, FLUX.1": (16, 128, 1), "FLUX.2": (128, 64, 2)}
"""Of 1024 px: channels, side of the grid, positions of a picture's grid in each on a side."""


def alone(rounds: int) -> str:
    """The map in this process, on float16."""
    draw = np.random.default_rng(0)
    rows = []
    for name, (channels, side, patch) in LATENTS.items():
        linear = Linear(draw.normal(0, 0.1, (channels + 1, 3 * patch * patch)).astype(np.float32), 20.0)
        array = draw.standard_normal((channels, side, side)).astype(np.float16)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            apply(linear, array)
            seconds.append(time.perf_counter() - began)
        slow = float(np.percentile(seconds, 95)) * 1e3
        rows.append([name, f"{channels} × {side} × {side}", milliseconds(seconds), f"{slow:.3g}"])
    return table(("latents of 1024 px", "shape", "p50, ms", "p95, ms"), rows)


async def flooded(url: str, body: bytes, clients: int, told: Counter[str], computes: list[float]) -> None:
    """Asks for linear previews until it is cancelled."""

    async def one(http: httpx.AsyncClient) -> None:
        while True:
            answer = await http.post(f"{url}/decode", params={"preview": "linear"}, content=body)
            told[str(answer.status_code)] += 1
            if found := re.search(r"compute;dur=([\d.]+)", answer.headers.get("server-timing", "")):
                computes.append(float(found[1]))

    async with httpx.AsyncClient(timeout=None, trust_env=False) as http:
        await asyncio.gather(*(one(http) for _ in range(clients)))


async def decodes(http: httpx.AsyncClient, url: str, body: bytes, count: int) -> float:
    """The median of so many, in seconds."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        answer = await http.post(f"{url}/decode", content=body)
        answer.raise_for_status()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


async def beside(pixels: int, rounds: int, count: int, clients: int) -> str:
    """Full decodes with and without the flood."""
    rng = random.Random(0)
    body, small = npy(latent(rng, pixels)), npy(latent(rng, 1024))
    told: Counter[str] = Counter()
    computes: list[float] = []
    quiet, loud = [], []
    with tempfile.TemporaryDirectory() as name:
        (models := Path(name) / "models").mkdir()
        shutil.copy(EMBEDDED, models)
        async with (
            service(models, Path(name) / "log") as (url, _),
            httpx.AsyncClient(timeout=None, trust_env=False) as http,
        ):
            while (await http.post(f"{url}/decode", params={"preview": "linear"}, content=small)).status_code == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.5)  # its map is being fitted
            await decodes(http, url, body, 2)
            for index in range(rounds):
                for flood in (False, True) if index % 2 else (True, False):
                    if not flood:
                        quiet.append(await decodes(http, url, body, count))
                        continue
                    task = asyncio.ensure_future(flooded(url, small, clients, told, computes))
                    loud.append(await decodes(http, url, body, count))
                    task.cancel()
                    await asyncio.wait([task])
    ratio = median(b / a for a, b in zip(quiet, loud, strict=True))
    row = [str(pixels), milliseconds(quiet), milliseconds(loud), f"×{ratio:.3f}", str(told["200"]), str(told["429"])]
    slow = float(np.percentile(computes, 95))
    said = f"The service's own word on the map's compute: p50 {median(computes):.1f} ms, p95 {slow:.1f} ms."
    head = ("px", "alone, ms", "flooded, ms", "flooded / alone", "previews answered", "dropped")
    return f"{table(head, [row])}\n\n{said}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pixels", type=int, default=512, help="side of the full decodes")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--decodes", type=int, default=6, help="in each half of a round")
    options.add_argument("--clients", type=int, default=4, help="that ask for previews")
    args = options.parse_args()
    print(f"{processor()}, numpy {np.__version__}, {args.rounds} rounds\n")
    print(alone(500), "\n")
    print(asyncio.run(beside(args.pixels, args.rounds, args.decodes, args.clients)))


if __name__ == "__main__":
    main()
