"""A folder of pictures into latents: `latentd encode` beside the plain loop that trainers run, one picture at a time.

`python -m benchmarks.caching` makes JPEG files of several aspects and encodes them in turns, each time in a new
process: with diffusers' autoencoder in a loop (open, resize, cut, encode, save), and with `latentd encode --buckets`.
Same weights, same buckets, same precision. Seconds are from the loading of the model to the last file, imports aside:
of the clock, and of the processor, which others that use it do not change.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.cli import main as main_of_latentd
from app.tools.buckets import parse_buckets
from benchmarks.cpu import processor
from benchmarks.pairs import alternate, speedup, table
from benchmarks.peer import NETWORKS, Network, peer

HEADER = (
    *("network", "buckets", "precision", "pictures"),
    *("plain loop, pictures/s", "latentd encode", "ratio"),
    *("plain loop, s of a processor for a picture", "latentd encode", "ratio", "max Δ"),
)
WAYS = ("plain", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ((1200, 800), (800, 1200), (1000, 1000), (1600, 900), (900, 1200))


def draw(folder: Path, count: int) -> None:
    """JPEG files of smooth noise, as large as photographs of a training set."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        small = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:05}.jpg", quality=92)


@torch.inference_mode()
def plain(network: Network, weights: Path, folder: Path, out: Path, buckets: str, precision: str) -> None:
    """The loop."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    kind: Any = AutoencoderTiny if network == "tiny" else AutoencoderKL
    model = kind.from_pretrained(weights, torch_dtype=DTYPES[precision]).eval()
    sizes = parse_buckets(buckets)
    for path in sorted(folder.iterdir()):
        picture = Image.open(path).convert("RGB")
        cut = sizes.cut(*picture.size)
        picture = picture.resize(cut.resized, Image.Resampling.BOX).crop(cut.box)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        encoded = model.encode(x.to(model.dtype))
        latent = encoded.latents if network == "tiny" else encoded.latent_dist.mode()
        np.save(out / f"{path.stem}.npy", latent.float().numpy())


def ours(weights: Path, folder: Path, out: Path, buckets: str, precision: str) -> None:
    """The command."""
    words = ["encode", str(folder), "-o", str(out), "--buckets", buckets, "--models", str(weights.parent)]
    words += ["--device", "cpu", "--precision", precision, "--latents", "raw", "--force"]
    if main_of_latentd(words):
        raise SystemExit(1)


IMPORTS = {
    "plain": ("diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.autoencoders.autoencoder_tiny"),
    "ours": ("app.main", "app.tools.folders"),
}


def timed(way: str, network: Network, paths: tuple[Path, Path, Path], buckets: str, precision: str) -> None:
    """One of the two, in this process; prints its seconds by the clock and of the processor."""
    for name in IMPORTS[way]:
        import_module(name)
    clock, processor = time.perf_counter(), time.process_time()
    if way == "plain":
        plain(network, *paths, buckets, precision)
    else:
        ours(*paths, buckets, precision)
    print(time.perf_counter() - clock, time.process_time() - processor)


def measure(network: Network, buckets: str, precision: str, count: int, rounds: int) -> list[str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        draw(top / "in", count)
        weights = top / "models" / "peer"
        peer(network).save_pretrained(weights)
        for out in WAYS:
            (top / out).mkdir()
        busy: dict[str, list[float]] = {way: [] for way in WAYS}

        def run(way: str) -> float:
            given = [way, network, str(weights), str(top / "in"), str(top / way), buckets, precision]
            command = [sys.executable, "-m", "benchmarks.caching", "--timed", *given]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            clock, processor = told.split()[-2:]
            busy[way].append(float(processor))
            return float(clock)

        seconds = alternate({way: partial(run, way) for way in WAYS}, rounds, warmup=0)
        rates = [f"{count / median(seconds[way]):.2f}" for way in WAYS]
        costs = [f"{median(busy[way]) / count:.2f}" for way in WAYS]
        told = [*rates, speedup(seconds["ours"], seconds["plain"]), *costs, speedup(busy["ours"], busy["plain"])]
        return [NETWORKS[network], buckets, precision, str(count), *told, f"{_apart(top):.0e}"]


def _apart(top: Path) -> float:
    """The largest difference of two latents of one picture, as a part of their range."""
    most = 0.0
    for path in (top / "plain").glob("*.npy"):
        a, b = np.load(path), np.load(top / "ours" / path.name)
        most = max(most, float(np.abs(a - b).max() / np.ptp(a)))
    return most


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--timed", nargs=7, help=argparse.SUPPRESS)
    options.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    options.add_argument("--buckets", nargs="+", default=["512x512:512:512-512", "512x512:64"])
    options.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--pictures", type=int, default=24)
    args = options.parse_args()
    if args.timed:
        way, network, weights, folder, out, buckets, precision = args.timed
        paths = Path(weights), Path(folder), Path(out)
        timed(way, "tiny" if network == "tiny" else "kl", paths, buckets, precision)
        return
    versions = f"torch {torch.__version__}, diffusers {version('diffusers')}, Pillow {version('pillow')}"
    print(f"{processor()}, {torch.get_num_threads()} threads, {versions}, {args.rounds} rounds\n")
    rows = []
    for network, buckets, precision in itertools.product(args.networks, args.buckets, args.precisions):
        rows.append(measure(network, buckets, precision, args.pictures, args.rounds))
        print(" ".join(rows[-1]), flush=True)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
