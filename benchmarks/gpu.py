"""`make bench-gpu`: fp16 VAEs on a GPU beside diffusers, on the same random weights, in one call of under ten minutes.

Each way of ours (whole, strips, recompute) and of diffusers (as its users have it, in channels_last, compiled) runs in
every round, in turns. Times are medians; ratios are medians of the rounds' ratios. The bound is the card's own: the
network's multiplications at the rate of its matrix products, and three passes over each map that is normalised at the
rate of its copies, both measured at the start. Peaks are what torch allocated above the weights and the input. With
`--device cpu` the same runs where there is no card: to see that it runs, not how fast.
"""

import argparse
import copy
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from app.execution.banded import RECOMPUTE, STRIPS, AnyExecution, gather
from app.execution.primitive import Whole
from app.execution.program import record
from app.vae.autoencoder import Autoencoder
from benchmarks.pairs import alternate, milliseconds, table
from benchmarks.peer import Op, ours, peer, run_peer

Network = Literal["SD KL", "FLUX.1", "TAESD"]
OPS: tuple[Op, ...] = ("decode", "encode")
EXECUTIONS: dict[str, AnyExecution] = {"whole": Whole(), "strips": STRIPS, "recompute": RECOMPUTE}
PEERS = ("diffusers", "channels_last", "compiled")
SIDES = (512, 1024, 2048, 4096)
COMPILED = (512, 1024)  # px; a compilation takes up to a minute
LARGEST_PEER = 2048  # px of the peer in its other two forms
ROUNDS, WARMUP = 10, 2
HEADER = ("", "op", "px", "way", "ms", "diffusers' time / this", "of the bound", "peak, MiB", "max Δ, of the range")


@dataclass(frozen=True)
class Card:
    """What a device reaches in fp16 by itself."""

    name: str
    flops: float  # per second, of a matrix product
    bytes: float  # per second, read and written by a copy


@dataclass(frozen=True)
class Row:
    """One way to do the work."""

    network: str
    op: Op
    side: int
    way: str
    ms: float | None  # None: out of memory
    speedup: float | None  # diffusers' time over this one's
    bound: float | None  # the least time that the card allows, over this one
    peak_mib: float | None
    apart: float | None  # largest difference from diffusers' own, of its range

    def cells(self) -> list[str]:
        """The row of the table."""
        found = "out of memory" if self.ms is None else milliseconds([self.ms / 1e3])
        ratio, bound = ("" if each is None else f"{each:.2f}" for each in (self.speedup, self.bound))
        peak = "" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        apart = "" if self.apart is None else f"{self.apart:.0e}"
        return [self.network, self.op, str(self.side), self.way, found, ratio and f"×{ratio}", bound, peak, apart]


class Clock:
    """Time and memory on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def timed(self, work: Callable[[], object]) -> Callable[[], float]:
        """Work as something that can be timed: on a GPU between two events of its stream."""

        def run() -> float:
            if not self.cuda:
                began = time.perf_counter()
                work()
                return time.perf_counter() - began
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return run

    def peak(self, work: Callable[[], object]) -> float | None:
        """MiB that `work` had allocated at once, above what was there before."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20

    def card(self) -> Card:
        """The device's own rates."""
        side, size = (8192, 1 << 30) if self.cuda else (1024, 1 << 26)
        a, b = (torch.randn(side, side, device=self.device).half() for _ in range(2))
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        product, copied = self.timed(lambda: a @ b), self.timed(lambda: target.copy_(source))
        seconds = alternate({"product": product, "copy": copied}, rounds=10, warmup=3)
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        return Card(name, 2 * side**3 / median(seconds["product"]), 2 * size / median(seconds["copy"]))


def flux(**more: Any) -> Any:
    """diffusers' model of FLUX.1: SD's widths, 16 channels, no convolutions around the latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    model = AutoencoderKL(**blocks, **widths, use_quant_conv=False, use_post_quant_conv=False, **more)
    return model.eval().requires_grad_(False)


PAIRS: dict[Network, Callable[[], tuple[Any, Any]]] = {
    # of each network: diffusers' and ours
    "SD KL": lambda: (model := peer("kl"), ours("kl", model)),
    "FLUX.1": lambda: (model := flux(), ours("kl", model)),
    "TAESD": lambda: (model := peer("tiny"), ours("tiny", model)),
}


def given(network: Autoencoder, op: Op, side: int, device: torch.device) -> Tensor:
    """Pixels in [-1, 1] or latents, in fp16 and channels_last."""
    generator = torch.Generator().manual_seed(side)
    config = network.config
    if op == "encode":
        x = torch.rand(1, config.pixel_channels, side, side, generator=generator) * 2 - 1
    else:
        rows = side // config.spatial_factor
        x = torch.randn(1, config.latent_channels, rows, rows, generator=generator)
    return x.to(device, torch.float16).contiguous(memory_format=torch.channels_last)


def least_seconds(network: Autoencoder, op: Op, x: Tensor, card: Card) -> float:
    """What the card needs for the arithmetic, and for normalising: a map is read for its statistics, read, written."""
    program = record(network.decode if op == "decode" else network.encode, tuple(x.shape))
    traffic = 3 * x.itemsize * sum(node.x.elements for node in program.nodes if node.x and node.normed is not None)
    return sum(node.banded_flops for node in program.nodes) / card.flops + traffic / card.bytes


@dataclass(frozen=True)
class Bench:
    """One network on one device, ours and the peer's."""

    name: Network
    mine: Autoencoder
    theirs: dict[str, Any]  # the peer as it is and in its other forms
    clock: Clock
    card: Card

    def works(self, op: Op, side: int) -> dict[str, Callable[[], Tensor]]:
        """Each way to do the work."""
        x = given(self.mine, op, side, self.clock.device)
        network = self.mine.decode if op == "decode" else self.mine.encode
        tiny = self.name == "TAESD" and op == "encode"
        found: dict[str, Callable[[], Tensor]] = {}
        for name, model in self.theirs.items():
            if name == "diffusers" or side <= (max(COMPILED) if name == "compiled" else LARGEST_PEER):
                found[name] = partial(run_peer, model, op, x.contiguous() if name == "diffusers" else x)
        for name, execution in EXECUTIONS.items():
            found[name] = partial(gather, execution, network, (x + 1) / 2 if tiny else x)
        return found

    def rows(self, op: Op, side: int, rounds: int) -> Iterator[Row]:
        """The table's rows for one size."""
        works, outputs, lost = self.works(op, side), dict[str, Tensor](), set[str]()
        for name, work in works.items():
            try:
                outputs[name] = self._compared(work(), op, name)
            except torch.OutOfMemoryError:
                lost.add(name)
                torch.cuda.empty_cache()
        fit = {name: work for name, work in works.items() if name not in lost}
        truth = outputs.get("diffusers")
        apart = {name: _apart(found, truth) for name, found in outputs.items()}
        outputs.clear()
        del truth
        peaks = {name: self.clock.peak(work) for name, work in fit.items()}
        seconds = alternate({name: self.clock.timed(work) for name, work in fit.items()}, rounds, WARMUP)
        least = least_seconds(self.mine, op, given(self.mine, op, side, self.clock.device), self.card)
        for name in works:
            took = seconds.get(name)
            if took is None:
                yield Row(self.name, op, side, name, None, None, None, None, None)
                continue
            their = seconds.get("diffusers")
            ratio = median(t / m for t, m in zip(their, took, strict=True)) if their else None
            ms = median(took) * 1e3
            yield Row(self.name, op, side, name, ms, ratio, least * 1e3 / ms, peaks[name], apart[name])

    def _compared(self, found: Tensor, op: Op, way: str) -> Tensor:
        """A result on the host, in the peer's range of pixels."""
        tiny = self.name == "TAESD" and op == "decode" and way in EXECUTIONS
        return (found * 2 - 1 if tiny else found).float().cpu()


def _apart(found: Tensor, truth: Tensor | None) -> float | None:
    if truth is None:
        return None
    return float((found - truth).abs().max() / (truth.max() - truth.min()))


def bench(name: Network, clock: Clock, card: Card, compiles: bool) -> Bench:
    """The network in every form."""
    theirs, mine = PAIRS[name]()
    theirs = theirs.to(clock.device, torch.float16)
    forms = {"diffusers": theirs, "channels_last": copy.deepcopy(theirs).to(memory_format=torch.channels_last)}
    if compiles and name == "SD KL":
        compiled = copy.deepcopy(forms["channels_last"])
        compiled.decoder, compiled.encoder = torch.compile(compiled.decoder), torch.compile(compiled.encoder)
        forms["compiled"] = compiled
    return Bench(name, mine.to(clock.device, torch.float16), forms, clock, card)


def measured(
    networks: Iterable[Network], sides: Iterable[int], clock: Clock, card: Card, args: argparse.Namespace
) -> Iterator[Row]:
    """Every row that there is time for, small pictures of all networks first."""
    ends = time.monotonic() + args.seconds
    benches = [bench(name, clock, card, args.compile) for name in networks]
    for side in sides:
        for each in benches:
            for op in OPS:
                if time.monotonic() > ends:
                    print(f"no time left for {each.name} {op} {side}", file=sys.stderr)
                    continue
                yield from each.rows(op, side, args.rounds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--networks", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=400.0, help="after which no size is begun any more")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="the rows and the card, as JSON")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here, nothing was measured")
        return
    clock = Clock(torch.device(args.device))
    card = clock.card()
    own = f"{card.flops / 1e12:.3g} TFLOP/s, {card.bytes / 1e9:.4g} GB/s"
    versions = f"torch {torch.__version__}, diffusers {version('diffusers')}"
    print(f"{datetime.date.today()}, {card.name}: {own}; {versions}, fp16, batch 1, {args.rounds} rounds, medians\n")
    print(table(HEADER, ()))
    rows = []
    for row in measured(args.networks, args.sides, clock, card, args):
        rows.append(row)
        print("| " + " | ".join(row.cells()) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"card": asdict(card), "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
