"""Which precision and which execution a batch runs in. Arithmetic only: asks no device.

Two axes: memory pressure walks executions (whole -> strips -> recompute, batch -> 1), non-finite output walks
dtypes (fp16 -> fp32).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from app.terms import EXECUTIONS, Dtype, ExecutionName, Fp16, Precision, Tiling

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

FORWARD_PIXELS = 8_388_608
"""Output pixels of one whole forward: at 256 channels, 2**31 elements, where CUDA kernels index with 32 bits."""


@dataclass(frozen=True)
class ExecutionPlan:
    """How a group of items runs: str(plan) is what the response and the metrics say."""

    dtype: Dtype
    execution: ExecutionName
    batch: int
    budget: int | None = None  # bytes that recompute may take to be faster; None: as few as it can

    def __str__(self) -> str:
        return f"{self.dtype}/{self.execution}"


Peak = Callable[[ExecutionPlan], int]
"""Forecast working memory of a plan in bytes."""


def dtypes(wish: Precision, setting: Precision, device: str, fp16: Fp16) -> tuple[Dtype, ...]:
    """The precisions to try, in order.

    A request's own `precision` is honoured alone; the setting is a first choice with fp32 behind it; auto is fp16
    on CUDA and fp32 on a CPU. A checkpoint that overflows in fp16 starts behind it.
    """
    if wish != "auto":
        return (wish,)
    first: Dtype = setting if setting != "auto" else ("fp16" if device == "cuda" else "fp32")
    if first == "fp16" and fp16 == "overflows":
        return ("fp32",)
    return (first,) if first == "fp32" else (first, "fp32")


def candidates(
    dtype: Dtype,
    tiling: Tiling,
    items: int,
    pixels: int,
    device: str,
    executions: Collection[ExecutionName] = EXECUTIONS,
) -> Iterator[ExecutionPlan]:
    """Plans for `items` pictures of `pixels` each, fastest first, by those `executions` that the network has.

    Whole in the largest batch, then in halves of it, then one by one in strips and recompute.
    """
    if tiling != "always":
        batch = min(items, FORWARD_PIXELS // pixels) if device == "cuda" else items
        while batch:
            yield ExecutionPlan(dtype, "whole", batch)
            batch //= 2
    if tiling != "never":
        yield from (ExecutionPlan(dtype, name, 1) for name in EXECUTIONS[1:] if name in executions)


def choose(plans: Iterator[ExecutionPlan], peak: Peak, available: int) -> ExecutionPlan | None:
    """The first plan whose forecast fits into the available bytes; None where none does."""
    return next((plan for plan in plans if peak(plan) <= available), None)


def after(plans: Iterator[ExecutionPlan], failed: ExecutionPlan) -> Iterator[ExecutionPlan]:
    """The candidates that are smaller than `failed`, which ran out of memory after all."""
    return (plan for plan in plans if _size(plan) < _size(failed))


def _size(plan: ExecutionPlan) -> tuple[int, int, bool]:
    return -EXECUTIONS.index(plan.execution), plan.batch, plan.budget is not None
