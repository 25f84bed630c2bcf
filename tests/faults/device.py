"""A device that goes wrong at any operation of a forward, or in its driver, or because its memory is full."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.engine import compute
from app.engine.forecast import CountingMode
from app.engine.planning import TORCH_DTYPES, ExecutionPlan

STRIDE = int(os.environ.get("FAULT_STRIDE", "19"))
"""Each step is a request or two; FAULT_STRIDE=1 tries all of them."""

UNFILLED = ("aten.empty", "aten.new_empty")
"""Operations whose results are written to later."""

Fault = Callable[[ExecutionPlan, int, list[Tensor]], None]
"""Called after each step of a forward with its plan, its number and what it made; raises, waits, or writes there."""


def fine(plan: ExecutionPlan, step: int, made: list[Tensor]) -> None:
    """Nothing goes wrong."""


class Steps(TorchDispatchMode):
    """The operations of one forward that make tensors, whatever they are called in its plan."""

    def __init__(self, plan: ExecutionPlan, fault: Fault) -> None:
        super().__init__()
        self.names: list[str] = []
        self._plan = plan
        self._fault = fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        there = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        leaves = (each for each in tree_leaves(out) if isinstance(each, Tensor))
        made = [each for each in leaves if each.untyped_storage()._cdata not in there]
        if made and not str(func).startswith(UNFILLED):
            self.names.append(str(func))
            self._fault(self._plan, len(self.names) - 1, made)
        return out


class Device:
    """Stands in for the one below `compute.forward`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Fault = fine
        self.forwards: list[tuple[str, list[str]]] = []  # plan, its steps
        self.at_end: Callable[[], None] = lambda: None  # what a device that runs behind its host says only then
        self._patch = monkeypatch
        real = compute.forward

        def forward(module: Any, inputs: Any, tasks: Any, plan: ExecutionPlan, check: Any) -> Any:
            steps = Steps(plan, self.fault)
            self.forwards.append((str(plan), steps.names))
            with steps:
                outcome = real(module, inputs, tasks, plan, check)
            self.at_end()
            return outcome

        monkeypatch.setattr(compute, "forward", forward)

    @property
    def plans(self) -> list[str]:
        """What ran, in order."""
        return [plan for plan, _ in self.forwards]

    @property
    def steps(self) -> int:
        """How many the last forward had."""
        return len(self.forwards[-1][1])

    @property
    def some(self) -> range:
        """Of these every STRIDE-th."""
        return range(0, self.steps, STRIDE)

    @property
    def few(self) -> range:
        """Of these fewer, where each takes longer."""
        return range(0, self.steps, STRIDE if STRIDE == 1 else self.steps // 3)

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """For so long."""
        self.fault = fault
        self.forwards.clear()
        try:
            yield
        finally:
            self.fault = fine

    def lose(self) -> None:
        """Its context is gone: from now on it answers nothing but this."""
        self._patch.setattr(compute, "probe", lambda device: lost())


def lost() -> None:
    """What every call on a card says whose context is gone."""
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def full() -> None:
    """What an allocator says that has no room."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def only(plans: str, fault: Fault) -> Fault:
    """The same in forwards whose plan begins so."""
    return lambda plan, now, made: fault(plan, now, made) if str(plan).startswith(plans) else None


def at(step: int, do: Callable[[], None]) -> Fault:
    """`do` at one step."""
    return lambda plan, now, made: do() if now == step else None


def spoilt(step: int, number: float) -> Fault:
    """From some step on the first that makes numbers in the plan's precision makes others instead, once."""
    done: list[int] = []

    def fault(plan: ExecutionPlan, now: int, made: list[Tensor]) -> None:
        found = [each for each in made if each.dtype == TORCH_DTYPES[plan.dtype]]
        if found and now >= step and not done:
            done.append(now)
            for each in found:
                each.fill_(number)

    return fault


class Card(CountingMode):
    """A card's memory below the real `CudaMemory`: a caching allocator, and another process that comes and goes.

    The tensors of a forward are counted as they are made and die, and one that has no room is refused, as the driver
    would do it. What the allocator has once taken, it keeps until it is emptied.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
        super().__init__()
        self.total = total
        self.others = 0  # bytes of another process
        self.reserved = 0
        self.weights: Callable[[], int] = lambda: 0
        self.calls = 0  # to the driver
        self.broken: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        real = compute.forward

        def forward(*given: Any) -> Any:
            with self:
                return real(*given)

        monkeypatch.setattr(compute, "forward", forward)
        for name, function in {
            "mem_get_info": lambda device: self._driver((self.total - self.others - self._mine(), self.total)),
            "memory_allocated": lambda device: self._driver(self.allocated),
            "memory_reserved": lambda device: self._driver(self._mine()),
            "max_memory_allocated": lambda device: self._driver(self.weights() + self.peak),
            "reset_peak_memory_stats": self._forget,
            "empty_cache": self._empty,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, left: int) -> None:
        """Another process has all but so many bytes, after torch's cache was emptied."""
        self._empty()
        self.others = self.total - self.allocated - left

    @property
    def allocated(self) -> int:
        """Bytes of weights and of tensors that are alive."""
        return self.weights() + self.alive

    def _mine(self) -> int:
        self.reserved = max(self.reserved, self.allocated)
        return self.reserved

    def _driver(self, answer: Any) -> Any:
        self.broken()
        with self._lock:
            self.calls += 1
        return answer

    def _forget(self, device: torch.device) -> None:
        self._driver(None)
        self.peak = self.alive

    def _empty(self) -> None:
        self._driver(None)
        self.reserved = self.allocated

    def _count(self, storage: torch.UntypedStorage) -> None:
        super()._count(storage)
        if self.allocated > self.total - self.others and self.allocated > self.reserved:
            full()
        self.reserved = max(self.reserved, self.allocated)
