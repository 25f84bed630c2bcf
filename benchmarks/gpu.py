"""`make bench-gpu`: fp16 encode and decode of the SD autoencoder beside diffusers, on the same random weights.

The peer runs as its users have it, and once more in channels_last, to tell the layout's part from the rest. Peaks
are what torch allocated above the weights and the input.
"""

import argparse
import copy
import datetime
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.pairs import alternate, milliseconds, speedup, table
from benchmarks.peer import Op, difference, inputs, ours, peer, run_ours, run_peer

HEADER = (
    "op",
    "px",
    "latentd, ms",
    "diffusers, ms",
    "… channels_last, ms",
    "latentd / diffusers",
    "… channels_last",
    "peak latentd, MiB",
    "peak diffusers, MiB",
    "max Δ",
)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Work on the GPU as something that can be timed: between two events of its stream."""

    def run() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return run


def peak(work: Callable[[], object]) -> str:
    """MiB that `work` had allocated at once, above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here, nothing was measured")
        return
    theirs = peer("kl")
    mine = ours("kl", theirs).to("cuda", torch.float16)
    theirs = theirs.to("cuda", torch.float16)
    theirs_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    rows = []
    for side in (512, 1024):
        ops: tuple[Op, ...] = ("encode", "decode")
        for op in ops:
            x = inputs(op, side).to("cuda", torch.float16)
            last = x.contiguous(memory_format=torch.channels_last)
            works: dict[str, Callable[[], Tensor]] = {
                "latentd": partial(run_ours, mine, op, last),
                "peer": partial(run_peer, theirs, op, x),
                "last": partial(run_peer, theirs_last, op, last),
            }
            delta = difference(works["latentd"](), works["peer"]())
            t = alternate({name: timed(work) for name, work in works.items()}, args.rounds, warmup=5)
            rows.append(
                [op, str(side)]
                + [milliseconds(t[name]) for name in works]
                + [speedup(t["latentd"], t["peer"]), speedup(t["latentd"], t["last"])]
                + [peak(works["latentd"]), peak(works["peer"]), delta]
            )
    print(
        f"\n{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"diffusers {version('diffusers')}, SD KL in fp16, batch 1, {args.rounds} rounds, medians\n"
    )
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
