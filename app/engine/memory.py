"""What a device's memory has room for. `CudaMemory` asks the driver, `FixedMemory` does sums."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from app.allocator import give_back

CUDA_HEADROOM = 512 << 20
"""Left to the driver, to convolution workspaces outside torch's allocator and to fragmentation."""

HOST_SHARE = 0.75
"""Of the machine's (or the container's) memory, what tensors may take; the rest is Python's, torch's and others'."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Level:
    """What a driver and torch's allocator say of a device, in bytes."""

    total: int
    free: int  # to the driver
    allocated: int  # by tensors
    reserved: int  # by torch, for tensors


class DeviceMemory(Protocol):
    """The one port of the engine: how much there is, and how much is free."""

    def capacity(self) -> int:
        """Bytes that weights and working memory may take together, all told."""

    def free(self, resident: int) -> int:
        """Bytes that new tensors may take while no forward runs, beside `resident` bytes of weights.

        Arithmetic alone, so that the event loop may ask: a driver may hang.
        """

    def look(self) -> Level:
        """How the device is now. On the device's thread, between two forwards."""

    def note(self, level: Level, resident: int) -> None:
        """Takes in what `look` saw when the weights there were `resident` bytes, and none were on their way."""

    def release(self) -> None:
        """Gives cached but unused blocks back. On the device's thread."""

    def evicted(self) -> None:
        """Weights were let go of: what they leave must serve anybody before the next forward."""

    def begin(self) -> None:
        """Begins the measurement of what work takes."""

    def peak(self) -> int | None:
        """Bytes that the work since `begin` took at most; None where that cannot be measured."""

    def kinds(self, resident: int) -> dict[str, int]:
        """Bytes by kind (total, free, allocated, reserved), for the metrics."""


class FixedMemory:
    """A given number of bytes: host memory, and every test of a mode switch."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def capacity(self) -> int:
        """The limit."""
        return self.limit

    def free(self, resident: int) -> int:
        """The limit less the weights."""
        return self.limit - resident

    def look(self) -> Level:
        """The limit, taken as free."""
        return Level(self.limit, self.limit, 0, 0)

    def note(self, level: Level, resident: int) -> None:
        """Nothing: the limit stands."""

    def release(self) -> None:
        """Returns the heap's free pages."""
        gc.collect()
        give_back()

    def evicted(self) -> None:
        """Nothing: the heap is everybody's."""

    def begin(self) -> None:
        """Nothing: see `peak`."""

    def peak(self) -> int | None:
        """Not measured."""
        return None

    def kinds(self, resident: int) -> dict[str, int]:
        """Total, free and allocated by the weights."""
        return {"total": self.limit, "free": self.free(resident), "allocated": resident, "reserved": resident}


class CudaMemory:
    """free = driver-free + torch-reserved - torch-allocated - headroom, and no more than `limit` leaves.

    Taken between forwards, when what is allocated is the weights; from there on weights that come and go are counted.
    """

    def __init__(self, device: torch.device, limit: int | None) -> None:
        self.device = device
        total = torch.cuda.mem_get_info(device)[1]
        self.limit = min(limit, total) if limit is not None else total
        self._begun_at = 0
        self._trim = False
        if limit is not None:  # so that the allocator refuses what the arithmetic would have refused
            torch.cuda.set_per_process_memory_fraction(self.limit / total, device)
        self.note(self.look(), 0)

    def capacity(self) -> int:
        """The card's memory, or the limit, less the headroom."""
        return self.limit - CUDA_HEADROOM

    def free(self, resident: int) -> int:
        """What the driver and torch's own cache had left at the last look, weights of today for those of then."""
        return self._room - resident

    def look(self) -> Level:
        """Asks the driver and the allocator."""
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        return Level(total, free, allocated, torch.cuda.memory_reserved(self.device))

    def note(self, level: Level, resident: int) -> None:
        """Keeps the level."""
        self._level = level
        cached = level.reserved - level.allocated
        self._room = min(level.free + cached, self.limit - level.allocated) - CUDA_HEADROOM + resident

    def release(self) -> None:
        """Returns torch's cached blocks to the driver."""
        gc.collect()
        torch.cuda.empty_cache()

    def evicted(self) -> None:
        """The blocks are those of the stream that copied the weights, and serve no other until the driver has them."""
        self._trim = True

    def begin(self) -> None:
        """Resets torch's peak counter."""
        if self._trim:
            self._trim = False
            self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._begun_at = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int | None:
        """Bytes above the level at the start."""
        return torch.cuda.max_memory_allocated(self.device) - self._begun_at

    def kinds(self, resident: int) -> dict[str, int]:
        """As the driver and torch reported them at the last look."""
        level = self._level
        return {"total": level.total, "free": level.free, "allocated": level.allocated, "reserved": level.reserved}


def host_memory() -> int:
    """Bytes that a CPU device may use: a share of the machine's memory, or of the container's limit."""
    pages = Path("/proc/meminfo").read_text(encoding="ascii").split(maxsplit=2)  # "MemTotal: N kB ..."
    total = int(pages[1]) << 10
    if CGROUP_LIMIT.exists():
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return int(total * HOST_SHARE)


def memory_of(device: torch.device, limit: int | None, sharing: int = 1) -> DeviceMemory:
    """The memory of a device, taken as `limit` bytes large where one is given.

    `sharing` CPU devices have an equal part each of the host's.
    """
    if device.type == "cuda":
        return CudaMemory(device, limit)
    return FixedMemory(limit if limit is not None else host_memory() // sharing)
