"""`python -m benchmarks.wan`: pictures through the VAE of Wan 2.1 at its real width, beside diffusers, random weights.

diffusers runs its clip of one frame; ours is the two-dimensional network, in one go and in strips. All in one process,
in turns, in float32; each figure is a median, differences are of the range of diffusers' output.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from app.execution.banded import STRIPS, gather
from app.execution.primitive import Network, Whole
from app.vae.autoencoder_wan import AutoencoderWan, WanConfig, picture_tensors
from app.vae.layout_wan import wan_keys
from benchmarks.pairs import alternate, milliseconds, speedup, table

WIDTH = 96

LAST = torch.channels_last
Run = Callable[[], Tensor]


def networks() -> tuple[AutoencoderKLWan, AutoencoderWan]:
    """diffusers' and ours, of the same weights."""
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=WIDTH).eval()
    state = theirs.state_dict()
    names = wan_keys(state)
    parts = [part for key, value in state.items() for part in picture_tensors(names[key], value)]
    ours = AutoencoderWan(WanConfig(WIDTH, WIDTH, theirs.config.z_dim)).eval()
    layers = ((name, value.contiguous(memory_format=LAST) if value.dim() == 4 else value) for name, value in parts)
    ours.load_state_dict(dict(layers), assign=True)
    return theirs, ours.requires_grad_(False)


@torch.inference_mode()
def measure(side: int, rounds: int) -> list[list[str]]:
    """Rows of the table for pictures of one size."""
    theirs, ours = networks()
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    latents = torch.randn(1, ours.config.latent_channels, side // 8, side // 8)
    peers: dict[str, tuple[Run, Network, Tensor]] = {
        "decode": (lambda: theirs.decode(latents[:, :, None]).sample[:, :, 0], ours.decode, latents),
        "encode": (lambda: theirs.encode(pixels[:, :, None]).latent_dist.parameters[:, :, 0], ours.encode, pixels),
    }
    rows = []
    for op, (peer, network, given) in peers.items():
        x = given.contiguous(memory_format=torch.channels_last)
        runs: dict[str, Run] = {
            "diffusers": peer,
            "whole": partial(network, Whole(), x),
            "strips": partial(gather, STRIPS, network, x),
        }
        expected = peer()
        span = expected.max() - expected.min()
        seconds = alternate({name: partial(timed, run) for name, run in runs.items()}, rounds)
        for name in ("whole", "strips"):
            apart = ((runs[name]() - expected).abs().max() / span).item()
            times = (milliseconds(seconds[each]) for each in ("diffusers", name))
            rows.append([op, str(side), name, *times, speedup(seconds[name], seconds["diffusers"]), f"{apart:.1e}"])
    return rows


def timed(run: Run) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = [row for side in args.sides for row in measure(side, args.rounds)]
    print(table(("", "px", "ours", "diffusers, ms", "ours, ms", "ratio", "apart, of the range"), rows))


if __name__ == "__main__":
    main()
