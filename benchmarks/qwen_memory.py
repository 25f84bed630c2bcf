"""`python -m benchmarks.qwen_memory`: the memory of a picture's decode by Qwen-Image's VAE, beside diffusers.

Each way runs once in a process of its own, on random weights of the real width: seconds, tensors counted,
pages resident, and how far its picture is from the one that the same program makes in one go. `--picture` writes the
differences, amplified. Of a way that `--ways` leaves out, as it does not fit the machine, there is only the forecast.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from app.allocator import give_back, keep_pages
from app.engine.forecast import CountingMode
from app.execution.banded import STRIPS, AnyExecution, Banded, execute, forecast_bytes
from app.execution.footprint import whole_elements
from app.execution.primitive import Whole
from app.execution.program import record
from benchmarks.pairs import table
from benchmarks.published import inputs, networks, peer
from benchmarks.seams import LABEL, amplified, levels
from benchmarks.tiling import deviation

ARCHITECTURE = "wan21"
EXECUTIONS: dict[str, AnyExecution] = {"whole": Whole(), "strips": STRIPS}  # norms are pointwise: nothing to recompute
WAYS = (*EXECUTIONS, "diffusers", "diffusers tiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADER = ("px", "way", "max Δ, of the range", "PSNR, dB", "forecast, GB", "counted, GB", "resident, GB", "s")
AMPLIFIED = {"diffusers tiled": 8.0, "strips": 10_000.0}


def untiled(way: str) -> str:
    """The way whose result it should have."""
    return "diffusers" if way.startswith("diffusers") else "whole"


Bands = Callable[[Tensor], Iterator[tuple[int, Tensor]]]
"""What runs a network: (row, band) one after the other."""


def runner(way: str, side: int, dtype: torch.dtype) -> tuple[nn.Module, Bands, Tensor]:
    """The network of a way, what runs it band by band, and its latents."""
    theirs, ours = (each.to(dtype) for each in networks(ARCHITECTURE))
    x = inputs(ours, side)["decode"].to(dtype)
    if way in EXECUTIONS:
        keep_pages()
        return ours, partial(execute, EXECUTIONS[way], ours.decode), x
    tile(theirs, way)
    return theirs, lambda latents: iter([(0, peer(theirs, "decode", latents))]), x


def tile(theirs: Any, way: str) -> None:
    """Has diffusers decode tile by tile, or not."""
    (theirs.enable_tiling if way.endswith("tiled") else theirs.disable_tiling)()


@torch.inference_mode()
def child(way: str, side: int, dtype: torch.dtype, output: Path) -> dict[str, float]:
    """One run: its seconds and bytes; the picture goes into a file."""
    module, run, x = runner(way, side, dtype)
    drain(run(inputs_of(x, 8)))
    peak_reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    picture = np.lib.format.open_memmap(output, "w+", np.float32, (1, 3, side, side))
    gc.collect()
    give_back()
    peak_reset.write_text("5")
    before = kib("VmRSS")
    live = CountingMode([x, *module.parameters()])
    began = time.perf_counter()
    with live:
        for row, band in run(x):
            picture[:, :, row : row + band.shape[2]] = band.float().numpy()
            del band
    return {
        "seconds": time.perf_counter() - began,
        "counted": live.peak,
        "resident": (kib("VmHWM") - before) * 1024 - picture.nbytes,  # the file's pages are no part of the work
    }


def inputs_of(x: Tensor, rows: int) -> Tensor:
    """A corner of latents."""
    return x[:, :, :rows, :rows].contiguous(memory_format=torch.channels_last)


def drain(bands: Iterator[tuple[int, Tensor]]) -> None:
    for _, band in bands:
        del band


def forecast(way: str, side: int, dtype: torch.dtype) -> int:
    """Bytes by arithmetic: ours of the program, diffusers' of its tensors on torch's meta device."""
    theirs, ours = networks(ARCHITECTURE)
    latents = inputs(ours, side)["decode"]
    if way not in EXECUTIONS:
        tile(theirs.to("meta", dtype), way)
        with CountingMode(theirs.parameters()) as live, torch.inference_mode():
            peer(theirs, "decode", latents.to("meta", dtype))
        return int(live.peak)
    execution, shape = EXECUTIONS[way], tuple(latents.shape)
    if isinstance(execution, Banded):
        return forecast_bytes(execution, ours.decode, shape, dtype, torch.device("cpu"))
    return whole_elements(record(ours.decode, shape)) * dtype.itemsize


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def sheet(pictures: dict[str, Tensor], output: Path, side: int) -> None:
    """One picture of what was decoded and of the differences, a corner of 512 px of each."""
    crop = min(side, 512)
    panels = [(levels(pictures["whole"][..., :crop, :crop], 1), "decoded whole")]
    for way, factor in AMPLIFIED.items():
        if way in pictures and untiled(way) in pictures:
            delta = (pictures[way] - pictures[untiled(way)])[..., :crop, :crop]
            panels.append(amplified(delta, factor, way))
    page = Image.new("RGB", (len(panels) * (crop + 8) - 8, crop + LABEL), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for index, (panel, label) in enumerate(panels):
        left = index * (crop + 8)
        page.paste(Image.fromarray(panel), (left, LABEL))
        draw.text((left + 2, 5), label, "black", font)
    page.save(output, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures: what lies there is not decoded again")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    if args.child:
        print(json.dumps(child(args.child, args.side, dtype, args.keep)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        pictures: dict[str, Tensor] = {}
        rows = []
        for way in WAYS:
            if way not in args.ways:
                rows.append([str(args.side), way, "", "", gigabytes(forecast(way, args.side, dtype)), "", "", ""])
                continue
            output, told = (folder / f"{way} {args.side} {args.dtype}.{end}" for end in ("npy", "json"))
            if not told.exists():
                command = [sys.executable, "-m", "benchmarks.qwen_memory", "--child", way, "--side", str(args.side)]
                command += ["--dtype", args.dtype, "--keep", str(output)]
                answer = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                told.write_bytes(answer)
            figures = json.loads(told.read_text())
            pictures[way] = torch.from_numpy(np.load(output, mmap_mode="c"))
            apart = ["", ""]
            if untiled(way) != way and untiled(way) in pictures:
                most, _, psnr = deviation(pictures[way], pictures[untiled(way)])
                apart = [f"{most:.1e}", f"{psnr:.1f}"]
            sizes = (forecast(way, args.side, dtype), figures["counted"], figures["resident"])
            rows.append([str(args.side), way, *apart, *map(gigabytes, sizes), f"{figures['seconds']:.0f}"])
        print(table(HEADER, rows))
        if args.picture:
            sheet(pictures, args.picture, args.side)


if __name__ == "__main__":
    main()
