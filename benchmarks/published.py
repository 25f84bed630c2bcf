"""`python -m benchmarks.published`: pictures through VAEs at the widths they are published with, beside diffusers.

Weights are random. Of a VAE of clips diffusers runs a clip of one frame; ours is the two-dimensional network. Each runs
in one go and in strips. All in one process,
in turns, in float32; each figure is a median, differences are of the range of diffusers' output. With `--precisions`
instead: ours in half precision beside ours in float32.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKLHunyuanImage, AutoencoderKLQwenImage21, AutoencoderKLWan
from torch import Tensor

from app.execution.banded import STRIPS, gather
from app.execution.primitive import Network, Whole
from app.vae.architectures import ARCHITECTURES
from app.vae.autoencoder import Autoencoder
from app.vae.families import WAN22_MEAN, WAN22_STD
from app.vae.kernels import add_kernels
from benchmarks.pairs import alternate, milliseconds, speedup, table

WIDTHS = (128, 256, 512, 512, 1024, 1024)  # of Sana's and of HunyuanImage 2.1's

PEERS: dict[str, Callable[[], Any]] = {
    # of each architecture: diffusers' class with the options of the published config.json
    "wan21": AutoencoderKLWan,
    "wan22": lambda: AutoencoderKLWan(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=list(WAN22_MEAN),
        latents_std=list(WAN22_STD),
    ),
    "qwenimage21": AutoencoderKLQwenImage21,
    "dc": lambda: AutoencoderDC(
        latent_channels=32,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3,) * 6,
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    ),
    "hunyuan": lambda: AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        spatial_compression_ratio=32,
        sample_size=384,
    ),
}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAST = torch.channels_last

Run = Callable[[], Tensor]


def networks(architecture: str) -> tuple[Any, Autoencoder]:
    """diffusers' and ours, of the same weights."""
    torch.manual_seed(0)
    theirs = PEERS[architecture]().eval().requires_grad_(False)
    row, state = ARCHITECTURES[architecture], theirs.state_dict()
    named = {name: state[key] for key, name in row.keys(state).items()}
    shaped = {name: value.reshape(row.shape(name, tuple(value.shape))) for name, value in named.items()}
    ours = row.module(row.configure({name: tuple(value.shape) for name, value in shaped.items()}, None)).eval()
    parts = [part for name, value in shaped.items() for part in row.resident(name, value)]
    layers = ((name, value.contiguous(memory_format=LAST) if value.dim() == 4 else value) for name, value in parts)
    ours.load_state_dict(dict(layers), assign=True)
    add_kernels(ours.requires_grad_(False))
    return theirs, ours


def inputs(ours: Autoencoder, side: int) -> dict[str, Tensor]:
    """Of each op, what it takes for a picture of side x side."""
    config = ours.config
    generator = torch.Generator().manual_seed(side)
    rows = side // config.spatial_factor
    latents = torch.randn(1, config.latent_channels, rows, rows, generator=generator)
    pixels = torch.rand(1, config.pixel_channels, side, side, generator=generator) * 2 - 1
    return {"decode": latents.contiguous(memory_format=LAST), "encode": pixels.contiguous(memory_format=LAST)}


def peer(theirs: Any, op: str, x: Tensor) -> Tensor:
    """The same of diffusers: pixels, or moments, or the latents of a network that has no moments."""
    clips = hasattr(theirs, "temperal_downsample")
    given = x.contiguous().unsqueeze(2) if clips else x.contiguous()
    if op == "decode":
        found: Tensor = theirs.decode(given).sample
    else:
        encoded = theirs.encode(given)
        found = encoded.latent if isinstance(theirs, AutoencoderDC) else encoded.latent_dist.parameters
    return found[:, :, 0] if clips else found


def network_of(ours: Autoencoder, op: str) -> Network:
    return ours.decode if op == "decode" else ours.encode


@torch.inference_mode()
def measure(architecture: str, side: int, rounds: int) -> list[list[str]]:
    """Rows of the table for pictures of one size."""
    theirs, ours = networks(architecture)
    rows = []
    for op, x in inputs(ours, side).items():
        network = network_of(ours, op)
        runs: dict[str, Run] = {
            "diffusers": partial(peer, theirs, op, x),
            "whole": partial(network, Whole(), x),
            "strips": partial(gather, STRIPS, network, x),
        }
        expected = runs["diffusers"]()
        seconds = alternate({name: partial(timed, run) for name, run in runs.items()}, rounds, warmup=0)
        for name in ("whole", "strips"):
            apart = distance(runs[name](), expected)[0]
            times = (milliseconds(seconds[each]) for each in ("diffusers", name))
            ratio = speedup(seconds[name], seconds["diffusers"])
            rows.append([architecture, op, str(side), name, *times, ratio, f"{apart:.1e}"])
    return rows


@torch.inference_mode()
def precisions(architecture: str, side: int) -> list[list[str]]:
    """Rows of the table of half precision: the network as it stands, no fallback."""
    _, ours = networks(architecture)
    rows = []
    given = inputs(ours, side)
    exact = {op: network_of(ours, op)(Whole(), x) for op, x in given.items()}
    for name, dtype in HALVES.items():
        narrow = copy.deepcopy(ours).to(dtype)
        for op, x in given.items():
            found = network_of(narrow, op)(Whole(), x.to(dtype))
            most, rms = distance(found, exact[op])
            rows.append([architecture, op, str(side), name, f"{most:.1e}", f"{rms:.1e}"])
    return rows


def distance(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max, root mean square) of the difference, as parts of the range of `truth`."""
    delta = (found.float() - truth) / (truth.max() - truth.min())
    return delta.abs().max().item(), delta.square().mean().sqrt().item()


def timed(run: Run) -> float:
    """Seconds of one run: of the processor where there is one thread, which others on the machine do not prolong."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=["wan21"], choices=PEERS)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precisions", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [(architecture, side) for architecture in args.architectures for side in args.sides]
    if args.precisions:
        rows = [row for case in cases for row in precisions(*case)]
        print(table(("", "", "px", "dtype", "max Δ, of the range", "RMS Δ"), rows))
        return
    rows = [row for case in cases for row in measure(*case, args.rounds)]
    print(table(("", "", "px", "ours", "diffusers, ms", "ours, ms", "ratio", "apart, of the range"), rows))


if __name__ == "__main__":
    main()
