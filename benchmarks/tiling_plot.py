"""`python -m benchmarks.tiling_plot`: docs/tiling-memory.png, working memory against picture size, SD decode in fp32.

Lines are the peak of the tensors alive, counted on torch's `meta` device, where sizes are all there is: of Whole and of
diffusers by running them, of the bands by their arithmetic. Crosses are what malloc handed out in real runs of the
service's own code, as benchmarks.forecast measures it (`--measured`, sides up to which to run them: minutes).
Needs matplotlib: pip install -e '.[test,plot]'.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from app.engine.forecast import CountingMode
from app.execution.banded import RECOMPUTE, STRIPS, AnyExecution, Banded, forecast_bytes
from app.execution.primitive import Whole
from benchmarks.peer import LATENT_CHANNELS, SPATIAL_FACTOR, ours, peer
from benchmarks.tiling import TILE

SIDES = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
OURS: dict[str, AnyExecution] = {"whole": Whole(), "strips": STRIPS, "recompute": RECOMPUTE}
COLOURS = {
    "whole": "#444444",
    "strips": "#1f77b4",
    "recompute": "#2ca02c",
    "diffusers": "#ff7f0e",
    "diffusers, 512 px tiles (not the same picture)": "#d62728",
}


def latents(side: int) -> torch.Tensor:
    rows = side // SPATIAL_FACTOR
    return torch.empty(1, LATENT_CHANNELS, rows, rows, device="meta")


def counted_peer(model: Any, side: int, tiled: bool) -> int:
    """Bytes alive at most in diffusers' decode; its attention counted as the fused kernel that it is on a device."""
    (model.enable_tiling if tiled else model.disable_tiling)()
    z = latents(side)
    fused = mock.patch.object(F, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with fused, CountingMode([z, *model.parameters()]) as mode, torch.inference_mode():
        model.decode(z)
    peak: int = mode.peak
    return peak


def counted_ours(model: Any, execution: AnyExecution, side: int) -> int:
    z = latents(side)
    if isinstance(execution, Banded):
        return forecast_bytes(execution, model.decode, tuple(z.shape), torch.float32, torch.device("cpu"))
    with CountingMode([z, *model.parameters()]) as mode, torch.inference_mode():
        model.decode(execution, z)
    peak: int = mode.peak
    return peak


def measured(name: str, side: int) -> int:
    """Bytes that malloc handed out in a run of its own process."""
    command = [sys.executable, "-m", "benchmarks.forecast", "--one", "--network", "kl", "--op", "decode"]
    command += ["--sides", str(side), "--executions", name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=int, nargs="*", default=[256, 512, 1024], metavar="SIDE")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/tiling-memory.png"))
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    theirs = peer("kl")
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = TILE, TILE // SPATIAL_FACTOR
    model = ours("kl", theirs).to("meta")
    theirs = theirs.to("meta")
    lines = {name: [counted_ours(model, execution, side) for side in SIDES] for name, execution in OURS.items()}
    lines["diffusers"] = [counted_peer(theirs, side, tiled=False) for side in SIDES]
    lines[[*COLOURS][-1]] = [counted_peer(theirs, side, tiled=True) for side in SIDES]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, values in lines.items():
        dashes = "--" if name == "diffusers" else "-"  # it lies on ours
        axes.plot(SIDES, [value / 2**30 for value in values], dashes, label=name, color=COLOURS[name], linewidth=2)
        print(name, *(f"{side}: {value / 2**30:.3f} GiB" for side, value in zip(SIDES, values, strict=True)))
    for name in OURS:
        found = [measured(name, side) / 2**30 for side in args.measured]
        axes.plot(args.measured, found, "x", color=COLOURS[name], markersize=8)
        print(f"{name}, measured", *(f"{side}: {v:.3f} GiB" for side, v in zip(args.measured, found, strict=True)))
    axes.set(xscale="log", yscale="log", xlabel="side of a square picture, px", ylabel="working memory, GiB")
    axes.set_xticks(SIDES, labels=[str(side) for side in SIDES], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title("SD decode, float32: tensors alive at most (lines), malloc in real runs (crosses)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
