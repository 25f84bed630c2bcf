"""The peer: diffusers' autoencoders on random weights, and ours on the same ones.

Run as a program it is the peer alone, in a process whose allocator nobody has tuned: `PlainPeer` talks to that.
"""

import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from app.execution.primitive import Whole
from app.vae.architectures import ARCHITECTURES, architecture_of
from app.vae.autoencoder import Autoencoder
from app.vae.kernels import add_kernels

Network = Literal["kl", "tiny"]
Op = Literal["encode", "decode"]
NETWORKS: dict[Network, str] = {"kl": "SD KL", "tiny": "TAESD"}
LATENT_CHANNELS = 4
SPATIAL_FACTOR = 8


def peer(network: Network) -> Any:
    """diffusers' model of SD 1.x or TAESD, weights drawn from one seed."""
    from diffusers import AutoencoderKL as PeerKL
    from diffusers import AutoencoderTiny as PeerTiny

    torch.manual_seed(0)
    if network == "tiny":
        return PeerTiny().eval().requires_grad_(False)
    model = PeerKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
    )
    return model.eval().requires_grad_(False)


def ours(network: Network, model: Any) -> Autoencoder:
    """Our network with the weights of the peer's `model`, in channels_last and with kernels, as the service has it."""
    weights: dict[str, Tensor] = model.state_dict()
    row = ARCHITECTURES[network]
    named = {name: weights[key] for key, name in row.keys(weights).items()}
    state = {name: value.reshape(row.shape(name, tuple(value.shape))) for name, value in named.items()}
    net = row.module(row.configure({name: tuple(value.shape) for name, value in state.items()}, None))
    net.load_state_dict(state, assign=True)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's annotation lacks memory_format
    net.eval().requires_grad_(False)
    add_kernels(net)
    return net


def inputs(op: Op, side: int) -> Tensor:
    """Pixels (1, 3, side, side) in [-1, 1], or latents (1, z, side / 8, side / 8)."""
    generator = torch.Generator().manual_seed(side)
    if op == "encode":
        return torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    rows = side // SPATIAL_FACTOR
    return torch.randn(1, LATENT_CHANNELS, rows, rows, generator=generator)


def run_peer(model: Any, op: Op, x: Tensor) -> Tensor:
    """Moments or latents of pixels in [-1, 1]; pixels in [-1, 1] of latents."""
    if op == "decode":
        pixels: Tensor = model.decode(x).sample
        return pixels
    encoded = model.encode(x)
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    return latents


def run_ours(model: Autoencoder, op: Op, x: Tensor) -> Tensor:
    """The same of our network, including the tiny ones' step between [-1, 1] and [0, 1]."""
    tiny = architecture_of(model.config).name == "tiny"
    if op == "encode":
        latents: Tensor = model.encode(Whole(), (x + 1) / 2 if tiny else x)
        return latents
    pixels: Tensor = model.decode(Whole(), x)
    return pixels * 2 - 1 if tiny else pixels


def difference(a: Tensor, b: Tensor) -> str:
    """Largest deviation as a part of the range of `b`."""
    return f"{((a.float() - b.float()).abs().max() / (b.max() - b.min())).item():.0e}"


class PlainPeer:
    """The peer in a process of its own: `timed(op, side)` runs it there once and gives that process's seconds."""

    def __init__(self, network: Network) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer", network],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def timed(self, op: Op, side: int) -> float:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{op} {side}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer's process ended with status {process.wait(10)}")
        return float(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


@torch.inference_mode()
def answer(network: Network) -> None:
    """Reads `op side` lines, runs each, and writes its seconds."""
    model = peer(network)
    for line in sys.stdin:
        op, side = line.split()
        which: Op = "encode" if op == "encode" else "decode"
        x = inputs(which, int(side))
        start = time.perf_counter()
        run_peer(model, which, x)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    answer("tiny" if sys.argv[1] == "tiny" else "kl")
