"""Devices by name, calls on their threads, and the way of arrays to them."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def torch_device(name: str) -> torch.device:
    """The torch device of a worker's name; cpu:0, cpu:1 ... are all the one CPU."""
    return torch.device("cpu" if name.startswith("cpu") else name)


def device_names(devices: Sequence[str]) -> list[str]:
    """One name per device: several "cpu" become cpu:0, cpu:1, so that each has its own worker and label."""
    if list(devices) == ["auto"]:
        devices = ["cuda:0" if torch.cuda.is_available() else "cpu"]
    counts: dict[str, int] = {}
    names = []
    for device in devices:
        name = "cuda:0" if device == "cuda" else device
        if list(devices).count("cpu") > 1 and name == "cpu":
            counts[name] = counts.get(name, 0) + 1
            name = f"cpu:{counts[name] - 1}"
        names.append(name)
    return names


async def on(thread: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
    """The result of a blocking call on one thread."""
    return await asyncio.get_running_loop().run_in_executor(thread, function, *args)


def to_device(arrays: list[np.ndarray], device: torch.device, stream: torch.cuda.Stream | None) -> list[Tensor]:
    """Copies host arrays to the device; on CUDA on a stream of their own, so that a running batch goes on."""
    tensors = [torch.tensor(array) for array in arrays]
    if stream is None:
        return tensors
    with torch.cuda.stream(stream):
        on_device = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    stream.synchronize()
    for tensor in on_device:  # their blocks are this stream's, and are read by the one that computes
        tensor.record_stream(torch.cuda.default_stream(device))
    return on_device
