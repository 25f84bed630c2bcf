"""What a device's memory has room for. `CudaMemory` asks the driver, `FixedMemory` does sums."""

import gc
from pathlib import Path
from typing import Protocol

import torch

from app.allocator import give_back

CUDA_HEADROOM = 512 << 20
"""Left to the driver, to convolution workspaces outside torch's allocator and to fragmentation."""

HOST_SHARE = 0.75
"""Of the machine's (or the container's) memory, what tensors may take; the rest is Python's, torch's and others'."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class DeviceMemory(Protocol):
    """The one port of the engine: how much there is, and how much is free."""

    def capacity(self) -> int:
        """Bytes that weights and working memory may take together, all told."""

    def free(self, resident: int) -> int:
        """Bytes that new tensors may take now; `resident` is what the cache holds in weights."""

    def release(self) -> None:
        """Gives cached but unused blocks back."""

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

    def release(self) -> None:
        """Returns the heap's free pages."""
        gc.collect()
        give_back()

    def begin(self) -> None:
        """Nothing: see `peak`."""

    def peak(self) -> int | None:
        """Not measured."""
        return None

    def kinds(self, resident: int) -> dict[str, int]:
        """Total, free and allocated by the weights."""
        return {"total": self.limit, "free": self.free(resident), "allocated": resident, "reserved": resident}


class CudaMemory:
    """free = driver-free + torch-reserved - torch-allocated - headroom, and no more than `limit` leaves."""

    def __init__(self, device: torch.device, limit: int | None) -> None:
        self.device = device
        total = torch.cuda.mem_get_info(device)[1]
        self.limit = min(limit, total) if limit is not None else total
        self._level = 0
        if limit is not None:  # so that the allocator refuses what the arithmetic would have refused
            torch.cuda.set_per_process_memory_fraction(self.limit / total, device)

    def capacity(self) -> int:
        """The card's memory, or the limit, less the headroom."""
        return self.limit - CUDA_HEADROOM

    def free(self, resident: int) -> int:
        """What the driver and torch's own cache have left; `resident` is part of what is allocated."""
        allocated = torch.cuda.memory_allocated(self.device)
        driver = torch.cuda.mem_get_info(self.device)[0]
        cached = torch.cuda.memory_reserved(self.device) - allocated
        return min(driver + cached, self.limit - allocated) - CUDA_HEADROOM

    def release(self) -> None:
        """Returns torch's cached blocks to the driver."""
        gc.collect()
        torch.cuda.empty_cache()

    def begin(self) -> None:
        """Resets torch's peak counter."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._level = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int | None:
        """Bytes above the level at the start."""
        return torch.cuda.max_memory_allocated(self.device) - self._level

    def kinds(self, resident: int) -> dict[str, int]:
        """As the driver and torch report them."""
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "total": total,
            "free": free,
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
        }


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
