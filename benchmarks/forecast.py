"""Forecast peaks beside measured ones, on this CPU: `python -m benchmarks.forecast`, by default up to 1024 px.

Each run is a process of its own and goes the whole way from an array to an array, as the service does. Two things are
measured. Allocated: the bytes that malloc has handed out, tensors and kernels' scratch memory alike, sampled all along
(mallinfo2; glibc only). Resident: the high-water mark of the process's pages (VmHWM, reset through
/proc/self/clear_refs; Linux only), which has the gaps of the heap too.
"""

import argparse
import ctypes
import datetime
import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Self, cast, get_args

import numpy as np
import torch

from app.allocator import give_back, keep_pages
from app.engine import compute
from app.engine.forecast import Forecaster, network_shape
from app.engine.jobs import Task
from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.store.checkpoint import Checkpoint
from app.terms import Dtype, ExecutionName, Op
from app.vae.families import FAMILIES
from benchmarks.cpu import processor
from benchmarks.pairs import table
from benchmarks.peer import NETWORKS, Network, ours, peer

HEADER = ("network", "op", "px", "plan", "forecast, MB", "allocated, MB", "resident, MB", "forecast / allocated")
SAMPLE_SECONDS = 0.0005
FAMILY = {"kl": "sd1", "tiny": "taesd"}
WARM_SIDE = 64
OPS: tuple[Op, ...] = ("encode", "decode")


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


class MallInfo2(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


class Allocated:
    """Samples the bytes that malloc has handed out, in a thread; `peak` counts from the beginning's level."""

    def __init__(self) -> None:
        self._ask = ctypes.CDLL(None).mallinfo2
        self._ask.restype = MallInfo2
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.peak = 0

    def _now(self) -> int:
        info = self._ask()
        return int(info.uordblks) + int(info.hblkhd)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._now() - self._level)

    def __enter__(self) -> Self:
        self._level = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def picture(op: Op, side: int) -> np.ndarray:
    """One item's array."""
    generator = np.random.default_rng(0)
    if op == "encode":
        return generator.integers(0, 256, (side, side, 3), np.uint8)
    return generator.standard_normal((4, side // 8, side // 8), np.float32)


def measure(network: Network, op: Op, side: int, batch: int, plan: ExecutionPlan) -> tuple[int, int, int]:
    """(forecast, allocated, resident) bytes of one run in this process."""
    module = ours(network, peer(network)).to(TORCH_DTYPES[plan.dtype])
    checkpoint = cast(Checkpoint, SimpleNamespace(config=module.config, family=FAMILIES[FAMILY[network]]))
    task = Task(op, checkpoint)
    shape = replace(network_shape(checkpoint, op, side, side), kernels=True)
    forecast = Forecaster("cpu").peak(shape, plan)

    def run(side: int) -> None:
        compute.forward(module, [torch.tensor(picture(op, side))] * batch, [task] * batch, plan, lambda: None)

    run(WARM_SIDE)  # thread pools, code pages
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    with Allocated() as allocated:
        run(side)
    return forecast, allocated.peak, resident("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), nargs="+", default=list(NETWORKS))
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--executions", choices=get_args(ExecutionName), nargs="+", default=get_args(ExecutionName))
    parser.add_argument("--dtype", choices=get_args(Dtype), default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--one", action="store_true", help="only the first of each, in this process, as two numbers")
    args = parser.parse_args()
    cases = [
        (network, op, side, ExecutionPlan(args.dtype, execution, args.batch))
        for network in args.network
        for execution in args.executions
        for side in args.sides
        for op in args.op
    ]
    if args.one:
        keep_pages()
        network, op, side, plan = cases[0]
        print(*measure(network, op, side, args.batch, plan))
        return 0
    rows, bad = [], 0
    for network, op, side, plan in cases:
        command = [sys.executable, "-m", "benchmarks.forecast", "--one", "--network", network, "--op", op]
        command += ["--sides", str(side), "--executions", plan.execution]
        command += ["--dtype", plan.dtype, "--batch", str(plan.batch)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        forecast, allocated, in_pages = map(int, answer.stdout.split())
        ratio = forecast / allocated
        bad += not 1 <= ratio <= 1.25
        name = f"{plan} x{plan.batch}" if plan.batch > 1 else str(plan)
        megabytes = [f"{value / 1e6:.0f}" for value in (forecast, allocated, in_pages)]
        rows.append([NETWORKS[network], op, str(side), name, *megabytes, f"{ratio:.2f}"])
        print(*rows[-1], flush=True)
    print(f"\n{datetime.date.today()}, {processor()}, torch {torch.__version__}\n")
    print(table(HEADER, rows))
    print(f"\n{bad} of {len(rows)} outside 1.00 ... 1.25")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
