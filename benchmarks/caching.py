"""A folder of pictures into latents: `latentd encode` beside the plain loop that trainers run, one picture at a time.

`python -m benchmarks.caching` makes JPEG files of several aspects and encodes them in turns, each time in a new
process: with diffusers' autoencoder in a loop (open, resize, cut, encode, save), and with `latentd encode --buckets`.
Same weights, same buckets, same precision. Seconds are from the loading of the model to the last file, imports aside.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.tools.buckets import parse_buckets
from benchmarks.cpu import processor
from benchmarks.pairs import alternate, table
from benchmarks.peer import NETWORKS, Network, peer

HEADER = ("network", "buckets", "precision", "pictures", "plain loop, pictures/s", "latentd encode", "ratio", "max Δ")
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
    """The loop; prints its seconds."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    start = time.perf_counter()
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
    print(time.perf_counter() - start)


def ours(models: Path, folder: Path, out: Path, buckets: str, precision: str) -> float:
    """Seconds of `latentd encode`."""
    told = out / "summary.json"
    command = [sys.executable, "-m", "app", "encode", str(folder), "-o", str(out), "--buckets", buckets]
    command += ["--models", str(models), "--device", "cpu", "--precision", precision, "--latents", "raw", "--force"]
    subprocess.run([*command, "--summary", str(told)], check=True, stderr=subprocess.DEVNULL)
    return float(json.loads(told.read_text())["seconds"])


def measure(network: Network, buckets: str, precision: str, count: int, rounds: int) -> list[str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        draw(top / "in", count)
        weights = top / "models" / "peer"
        peer(network).save_pretrained(weights)
        for out in ("plain", "ours"):
            (top / out).mkdir()

        def loop() -> float:
            given = [network, str(weights), str(top / "in"), str(top / "plain"), buckets, precision]
            command = [sys.executable, "-m", "benchmarks.caching", "--plain", *given]
            return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

        runs = {"plain": loop, "ours": lambda: ours(top / "models", top / "in", top / "ours", buckets, precision)}
        seconds = alternate(runs, rounds, warmup=0)
        ratio = median(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
        rates = [f"{count / median(seconds[name]):.2f}" for name in ("plain", "ours")]
        return [NETWORKS[network], buckets, precision, str(count), *rates, f"×{ratio:.2f}", f"{_apart(top):.0e}"]


def _apart(top: Path) -> float:
    """The largest difference of two latents of one picture, as a part of their range."""
    most = 0.0
    for path in (top / "plain").glob("*.npy"):
        a, b = np.load(path), np.load(top / "ours" / path.name)
        most = max(most, float(np.abs(a - b).max() / np.ptp(a)))
    return most


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--plain", nargs=6, help=argparse.SUPPRESS)
    options.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    options.add_argument("--buckets", nargs="+", default=["512x512:512:512-512", "512x512:64"])
    options.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--pictures", type=int, default=24)
    args = options.parse_args()
    if args.plain:
        network, *paths, buckets, precision = args.plain
        weights, folder, out = map(Path, paths)
        plain("tiny" if network == "tiny" else "kl", weights, folder, out, buckets, precision)
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
