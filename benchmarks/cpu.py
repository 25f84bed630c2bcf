"""`make bench`: encode and decode on this CPU beside diffusers' eager float32, on the same random weights.

The peer runs twice: tuned, in this process, with our allocator settings and in channels_last, so that the networks
alone are compared; and in a process of its own as its users have it. `--quick` takes a minute or two, the whole ten.
"""

import argparse
import copy
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from app.allocator import keep_pages
from benchmarks.pairs import alternate, milliseconds, speedup, table
from benchmarks.peer import NETWORKS, Network, Op, PlainPeer, difference, inputs, ours, peer, run_ours, run_peer

OPS: tuple[Op, ...] = ("encode", "decode")
HEADER = (
    "network",
    "op",
    "px",
    "fp32, ms",
    "bf16, ms",
    "diffusers tuned, ms",
    "… own process, ms",
    "fp32 / tuned",
    "… own process",
    "bf16 / … own process",
    "max Δ of fp32",
)


def processor() -> str:
    """The processor's name, as far as this system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def wall(work: Callable[[], object]) -> Callable[[], float]:
    """Work on a CPU as something that can be timed."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timed


def measure(network: Network, sides: list[int], rounds: int, ops: Sequence[Op]) -> list[list[str]]:
    """One row for each op and size."""
    theirs = peer(network)
    fp32 = ours(network, theirs)
    theirs.to(memory_format=torch.channels_last)
    bf16 = copy.deepcopy(fp32).to(torch.bfloat16)
    rows = []
    with PlainPeer(network) as plain:
        for side in sides:
            for op in ops:
                x = inputs(op, side)
                last = x.contiguous(memory_format=torch.channels_last)
                half = last.to(torch.bfloat16)
                works: dict[str, Callable[[], Tensor]] = {
                    "fp32": partial(run_ours, fp32, op, last),
                    "bf16": partial(run_ours, bf16, op, half),
                    "tuned": partial(run_peer, theirs, op, last),
                }
                runs = {name: wall(work) for name, work in works.items()}
                runs["plain"] = partial(plain.timed, op, side)
                delta = difference(works["fp32"](), works["tuned"]())
                t = alternate(runs, rounds)
                rows.append(
                    [NETWORKS[network], op, str(side)]
                    + [milliseconds(t[name]) for name in ("fp32", "bf16", "tuned", "plain")]
                    + [speedup(t["fp32"], t["tuned"]), speedup(t["fp32"], t["plain"]), speedup(t["bf16"], t["plain"])]
                    + [delta]
                )
                print(f"{' '.join(rows[-1])}", flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256 px and three rounds")
    parser.add_argument("--rounds", type=int, help="5, quick 3")
    parser.add_argument("--sides", type=int, nargs="+")
    parser.add_argument("--networks", choices=list(NETWORKS), nargs="+", default=list(NETWORKS))
    parser.add_argument("--ops", choices=OPS, nargs="+", default=OPS)
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 5)
    sides = args.sides or ([256] if args.quick else [256, 512])
    keep_pages()
    rows = [row for network in args.networks for row in measure(network, sides, rounds, args.ops)]
    print(
        f"\n{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {version('diffusers')}, batch 1, {rounds} rounds, medians\n"
    )
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
