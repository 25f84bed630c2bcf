"""`python -m benchmarks.tiling`: exact bands beside diffusers' `enable_tiling()`, on the same random SD weights.

For each op, size and precision: the error of each way against its own untiled run in float32 and in the precision
itself, its working memory (tensors counted, and resident pages of a process of its own) and its time, taken in turns.
`--quick` takes a few minutes; the sizes of docs/tiling.md take an hour on two cores.
"""

import argparse
import copy
import datetime
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from app.allocator import give_back, keep_pages
from app.engine.forecast import CountingMode
from app.execution.banded import RECOMPUTE, STRIPS, AnyExecution, Banded, execute, forecast_bytes, gather
from app.execution.primitive import Whole
from benchmarks.pairs import alternate, table
from benchmarks.peer import SPATIAL_FACTOR, Op, inputs, ours, peer, run_peer

EXECUTIONS: dict[str, AnyExecution] = {"whole": Whole(), "strips": STRIPS, "recompute": RECOMPUTE}
WAYS = (*EXECUTIONS, "diffusers", "diffusers tiled")
TILE = 512  # pixels: diffusers takes the `sample_size` of the checkpoint's config, 512 for SD 1.x
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = (
    "op", "px", "dtype", "way", "max Δ", "RMS Δ", "PSNR, dB", "to fp32, RMS",
    "forecast, B/px", "counted, B/px", "resident, B/px", "time, s", "time / untiled",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One op at one size in one precision."""

    op: Op
    side: int
    dtype: str

    def input(self, device: str = "cpu") -> Tensor:
        return inputs(self.op, self.side).to(device, DTYPES[self.dtype])


class Networks:
    """Ours and the peer's on the same weights, in every precision asked for."""

    def __init__(self, device: str = "cpu") -> None:
        theirs = peer("kl")
        theirs.tile_sample_min_size, theirs.tile_latent_min_size = TILE, TILE // SPATIAL_FACTOR
        self._fp32 = {"peer": theirs.to(device), "ours": ours("kl", theirs).to(device)}

    def of(self, dtype: str) -> dict[str, Any]:
        if dtype == "fp32":
            return self._fp32
        return {name: copy.deepcopy(model).to(DTYPES[dtype]) for name, model in self._fp32.items()}


def way(networks: dict[str, Any], name: str, case: Case, x: Tensor) -> Callable[[], Tensor]:
    """The run of one way, its output joined."""
    if name in EXECUTIONS:
        return partial(gather, EXECUTIONS[name], getattr(networks["ours"], case.op), x)

    def run_theirs() -> Tensor:
        model = networks["peer"]
        (model.enable_tiling if name.endswith("tiled") else model.disable_tiling)()
        with torch.inference_mode():
            return run_peer(model, case.op, x)

    return run_theirs


def drain(bands: Iterator[tuple[int, Tensor]]) -> None:
    """Takes the bands as a service would that writes each to the host."""
    for _, band in bands:
        del band


def untiled(name: str) -> str:
    """The way whose result `name` should have."""
    return "diffusers" if name.startswith("diffusers") else "whole"


def deviation(found: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """(max, RMS, PSNR in dB) of the difference, as parts of the range of `truth`."""
    span = (truth.max() - truth.min()).item()
    delta = (found.float() - truth.float()) / span
    rms = delta.square().mean().sqrt().item()
    return delta.abs().max().item(), rms, -20 * torch.tensor(max(rms, 1e-12)).log10().item()


def counted(work: Callable[[], Tensor], networks: dict[str, Any], x: Tensor) -> tuple[Tensor, int]:
    """What `work` gives, and the peak bytes of its tensors: joined output and the kernels' copies of weights too."""
    gc.collect()
    live = CountingMode([x, *(p for model in networks.values() for p in model.parameters())])
    with torch.inference_mode(), live:
        out = work()
    return out, live.peak


def resident(case: Case, name: str) -> int | None:
    """Peak resident bytes that one run adds, in a process of its own; None where the system does not tell."""
    command = [sys.executable, "-m", "benchmarks.tiling", "--child", case.op, str(case.side), case.dtype, name]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    bytes_: int | None = json.loads(answer)
    return bytes_


def child(case: Case, name: str) -> int | None:
    """What `resident` asks the process of its own."""
    peak_reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not peak_reset.exists():
        return None
    networks = Networks().of(case.dtype)
    way(networks, name, Case(case.op, 64, case.dtype), Case(case.op, 64, case.dtype).input())()
    x = case.input()

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    gc.collect()
    give_back()  # what the making of the networks left would hide what the run takes
    peak_reset.write_text("5")
    before = kib("VmRSS")
    if name in EXECUTIONS:
        drain(execute(EXECUTIONS[name], getattr(networks["ours"], case.op), x))
    else:
        way(networks, name, case, x)()
    return (kib("VmHWM") - before) * 1024


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return seconds


def measure(case: Case, all_networks: Networks, names: list[str], rounds: int) -> list[list[str]]:
    """A row for each way."""
    networks, x = all_networks.of(case.dtype), case.input()
    works = {name: way(networks, name, case, x) for name in names}
    outputs, peaks = {}, {}
    for name, work in works.items():
        outputs[name], peaks[name] = counted(work, networks, x)
    exact = {}
    if case.dtype != "fp32":
        full = Case(case.op, case.side, "fp32")
        for name in sorted({untiled(name) for name in names}):
            exact[name] = way(all_networks.of("fp32"), name, full, x.float())()
    seconds = alternate({name: timed(work) for name, work in works.items()}, rounds, warmup=0) if rounds else {}
    rows = []
    pixels = case.side**2
    for name in works:
        base = untiled(name)
        row = [case.op, str(case.side), case.dtype, name]
        if base in outputs and base != name:
            most, rms, psnr = deviation(outputs[name], outputs[base])
            row += [f"{most:.1e}", f"{rms:.1e}", f"{psnr:.1f}"]
        else:
            row += ["", "", ""]
        row.append(f"{deviation(outputs[name], exact[base])[1]:.2e}" if exact else "")
        row.append(f"{forecast(networks, name, case, x) / pixels:.0f}" if name in ("strips", "recompute") else "")
        row.append(f"{peaks[name] / pixels:.0f}")
        pages = resident(case, name)
        row.append("" if pages is None else f"{pages / pixels:.0f}")
        if name in seconds:
            ratio = median(a / b for a, b in zip(seconds[name], seconds[base], strict=True)) if base in seconds else 0
            row += [f"{median(seconds[name]):.1f}", f"{ratio:.2f}" if ratio else ""]
        else:
            row += ["", ""]
        rows.append(row)
    return rows


def forecast(networks: dict[str, Any], name: str, case: Case, x: Tensor) -> int:
    execution = EXECUTIONS[name]
    assert isinstance(execution, Banded)
    return forecast_bytes(execution, getattr(networks["ours"], case.op), tuple(x.shape), x.dtype, x.device)


def huge(side: int) -> str:
    """One decode of `side` pixels in fp16 by each execution that fits, on a GPU: time and peak."""
    if not torch.cuda.is_available():
        return f"No CUDA device: the {side}×{side} fp16 decode was skipped."
    networks = Networks("cuda").of("fp16")
    x = Case("decode", side, "fp16").input("cuda")
    rows = []
    for name in ("strips", "recompute"):
        try:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            drain(execute(EXECUTIONS[name], networks["ours"].decode, x))
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            rows.append([name, f"{time.perf_counter() - start:.2f}", f"{peak / 2**30:.2f}", f"{peak / side**2:.0f}"])
        except torch.OutOfMemoryError:
            rows.append([name, "out of memory", "", ""])
    return table((f"{side} px decode, fp16", "time, s", "peak, GiB", "B/px"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--ops", nargs="+", choices=get_args(Op), default=list(get_args(Op)))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: none")
    parser.add_argument("--huge", type=int, default=8192, help="side of the picture decoded on a GPU")
    parser.add_argument("--quick", action="store_true", help="256 px, fp32, one round")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_pages()
    if args.child:
        op, side, dtype, name = args.child
        print(json.dumps(child(Case(op, int(side), dtype), name)))
        return
    sides, dtypes, rounds = ([256], ["fp32"], 1) if args.quick else (args.sides, args.dtypes, args.rounds)
    print(
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    networks = Networks()
    cases = [Case(op, side, dtype) for side in sides for dtype in dtypes for op in args.ops]
    rows = []
    for case in cases:
        rows += measure(case, networks, args.ways, rounds)
        print(f"{case}: done", file=sys.stderr, flush=True)
    print(table(HEADER, rows))
    print(huge(args.huge))


if __name__ == "__main__":
    main()
