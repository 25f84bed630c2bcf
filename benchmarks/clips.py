"""Wan 2.1's VAE over clips, beside diffusers: memory counted and resident, seconds, and how far its tiles are off.

Random weights at the real widths, for no trained ones are at hand: sizes, times and exactness do not depend on them.
`python -m benchmarks.clips` prints Markdown.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from app.allocator import keep_pages
from app.engine.forecast import NetworkShape, count
from app.engine.planning import ExecutionPlan
from app.execution.banded import STRIPS, gather
from app.execution.causal import Carry
from app.execution.slices import Sliced
from app.terms import ExecutionName
from app.vae import layout_wan
from app.vae.autoencoder_wan import AutoencoderWan, WanClipConfig, clip_tensors

CPU = torch.device("cpu")
CONFIG = WanClipConfig(96, 96, 16)
MODES = ("slices", "slices in bands", "clip in bands", "diffusers", "diffusers, tiled")


def reference() -> Any:
    """diffusers' network, random, the same each time."""
    torch.manual_seed(0)
    return AutoencoderKLWan().eval().requires_grad_(False)


def ours(model: Any) -> AutoencoderWan:
    """Our network with its weights."""
    state = model.state_dict()
    names = layout_wan.wan_keys(state)
    parts = dict(part for key, value in state.items() for part in clip_tensors(names[key], value))
    vae = AutoencoderWan(CONFIG).eval().requires_grad_(False)
    vae.load_state_dict(parts, strict=True)
    for weight in vae.parameters():
        if weight.dim() > 3:
            layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=layout)
    return vae


def decoder(mode: str) -> Callable[[Tensor], Tensor]:
    """What makes frames (T', 3, H, W) of latents (T, 16, h, w)."""
    model: Any = reference()
    if mode.startswith("diffusers"):
        if "tiled" in mode:
            model.enable_tiling()
        return lambda z: model.decode(z.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    vae = ours(model)

    def run(z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last)
        if mode == "clip in bands":
            return gather(STRIPS, vae.decode, z)
        carry: Carry = deque()
        if mode == "slices":
            return torch.cat([vae.decode(Sliced(carry), part) for part in z.split(1)])
        return torch.cat([gather(STRIPS, vae.decode, part, carry=carry) for part in z.split(1)])

    return run


def latents(frames: int, height: int, width: int) -> Tensor:
    """As many as so many frames are."""
    torch.manual_seed(1)
    return torch.randn(1 + (frames - 1) // 4, 16, height // 8, width // 8)


@torch.inference_mode()
def child(mode: str, frames: int, height: int, width: int) -> None:
    """Prints the resident peak over what there was before, in MiB, and seconds.

    The heap keeps nothing that is free, as the service has it where memory is short: else what is resident is glibc's.
    """
    keep_pages(False)
    run, z = decoder(mode), latents(frames, height, width)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    started = time.perf_counter()
    run(z)
    seconds = time.perf_counter() - started
    print((resident("VmHWM") - before) >> 10, f"{seconds:.1f}")


def resident(name: str) -> int:
    """KiB of this process, by Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0])


def measured(mode: str, frames: int, height: int, width: int) -> tuple[int, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.clips", "--child", mode, "--frames", str(frames)]
    asked = [*command, "--height", str(height), "--width", str(width)]
    peak, seconds = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    return int(peak), float(seconds)


def counted(mode: str, frames: int, height: int, width: int) -> int:
    """Forecast bytes, what goes in and comes out included."""
    name: ExecutionName = "whole" if mode == "slices" else "strips"
    whole = 1 + (frames - 1) // 4 if mode == "clip in bands" else None
    shape = NetworkShape(CONFIG, "decode", 16, height // 8, width // 8, frames=whole)
    return count(shape, ExecutionPlan("fp32", name, 1), CPU)


@torch.inference_mode()
def tiles(frames: int, height: int, width: int) -> str:
    """How far diffusers' tiles are from its whole."""
    z = latents(frames, height, width)
    whole = decoder("diffusers")(z)
    tiled = decoder("diffusers, tiled")(z)
    errors = (tiled - whole).square().flatten(1).mean(1)
    decibels = 10 * torch.log10(4 / errors)
    mine = [(decoder(mode)(z) - whole).abs().max().item() / 2 for mode in MODES[:3]]
    said = ", ".join(f"{mode} {error:.1e}" for mode, error in zip(MODES[:3], mine, strict=True))
    return (
        f"Tiled diffusers is {10 * torch.log10(4 / errors.mean()):.1f} dB from its whole, {decibels.min():.1f} dB in "
        f"the worst frame. Of ours, the largest difference from it, of the range: {said}."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=MODES)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=224)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.frames, args.height, args.width)
        return
    print("| 480x832, counted, GiB |", " | ".join(MODES[:3]), "|\n|---|---|---|---|")
    for frames in (5, 33, 81):
        sizes = [f"{counted(mode, frames, 480, 832) / 2**30:.2f}" for mode in MODES[:3]]
        print(f"| {frames} frames |", " | ".join(sizes), "|", flush=True)
    size = args.frames, args.height, args.width
    print(f"\n{args.frames} frames of {args.width}x{args.height}:\n")
    print("| | counted, MiB | resident, MiB | seconds |\n|---|---|---|---|")
    for mode in MODES:
        peak, seconds = measured(mode, *size)
        known = "" if mode.startswith("diffusers") else str(counted(mode, *size) >> 20)
        print(f"| {mode} | {known} | {peak} | {seconds:.1f} |", flush=True)
    print("\n" + tiles(5, 320, 320), flush=True)


if __name__ == "__main__":
    main()
