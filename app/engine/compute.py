"""The arithmetic of a batch on its device: arrays in, network, arrays out.

Pure functions, called on a device thread.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.engine.jobs import Task
from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.errors import Unavailable
from app.execution.banded import STRIPS, AnyExecution, Banded, execute, gather
from app.execution.primitive import AttentionBlock, Whole
from app.vae.autoencoder import Autoencoder

Check = Callable[[], None]
"""Called between bands, and between the layers of a whole run; raises to cancel."""


@dataclass(frozen=True)
class Outcome:
    """The items of one forward, and which of them are finite in every element."""

    arrays: list[np.ndarray]
    finite: list[bool]


class Watched(Whole):
    """`Whole` that calls `check` before each layer: a long run shows progress, and can be cancelled."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def conv(self, x: Tensor, conv: nn.Conv2d, **how: Any) -> Tensor:
        """See `Execution.conv`."""
        self._check()
        return super().conv(x, conv, **how)

    def attention(self, x: Tensor, block: AttentionBlock) -> Tensor:
        """See `Execution.attention`."""
        self._check()
        return super().attention(x, block)


def execution_of(plan: ExecutionPlan, check: Check) -> AnyExecution:
    """The execution that a plan names."""
    if plan.execution == "whole":
        return Watched(check)
    return STRIPS if plan.execution == "strips" else Banded("recompute", budget_bytes=plan.budget)


def probe(device: torch.device) -> None:
    """The smallest forward there is: raises what a broken device raises."""
    x = torch.ones(1, 1, 3, 3, device=device)
    if F.conv2d(x, x).item() != 9:
        raise Unavailable(f"the device {device} computes wrongly")


def out_of_memory(error: Exception) -> bool:
    """Whether a device is full, as torch's allocators, numpy, and (in words only) the CUDA libraries say it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    )


@torch.inference_mode()
def run(module: Autoencoder, inputs: list[Tensor], tasks: list[Task], plan: ExecutionPlan, check: Check) -> Outcome:
    """One forward of items that share a batch key.

    Inputs are uint8 (H, W, 3) to encode, floating (C, h, w) to decode, on the module's device. Outputs are float16
    (C, h, w) latents, or uint8 / uint16 (H, W, 3) pictures, on the host.
    """
    task = tasks[0]
    batch = torch.stack(inputs)
    execution = execution_of(plan, check)
    with _repeatable(task.deterministic, batch.device):
        if task.op == "encode":
            return _encode(module, batch, tasks, plan, execution, check)
        return _decode(module, batch, task, plan, execution, check)


def _repeatable(deterministic: bool, device: torch.device) -> AbstractContextManager[None]:
    if deterministic and device.type == "cuda":
        flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True
        )
        return flags
    return nullcontext()  # CPU kernels repeat themselves for a fixed number of threads


def _encode(
    module: Autoencoder, batch: Tensor, tasks: list[Task], plan: ExecutionPlan, execution: AnyExecution, check: Check
) -> Outcome:
    low, high = tasks[0].checkpoint.family.pixel_range
    # Into the network's range in float32 before the cast: half formats have no room for it afterwards.
    pixels = batch.permute(0, 3, 1, 2).float().mul_((high - low) / 255).add_(low).to(TORCH_DTYPES[plan.dtype])
    moments = gather(execution, module.encode, pixels, check=check).float()
    arrays, finite = [], []
    for index, task in enumerate(tasks):
        posterior = module.posterior(moments[index : index + 1])
        if task.seed is None:
            z = posterior.mode()
        else:
            z = posterior.sample(torch.Generator().manual_seed(task.seed))
        if task.latents == "scaled":
            z = task.checkpoint.family.latent_format.scale(z, module.bn)
        half = z[0].half().contiguous()
        finite.append(bool(half.isfinite().all()))
        arrays.append(half.cpu().numpy())
    return Outcome(arrays, finite)


def _decode(
    module: Autoencoder, batch: Tensor, task: Task, plan: ExecutionPlan, execution: AnyExecution, check: Check
) -> Outcome:
    family = task.checkpoint.family
    z = batch.float()
    if task.latents == "scaled":
        z = family.latent_format.unscale(z, module.bn)
    z = z.to(TORCH_DTYPES[plan.dtype]).contiguous(memory_format=torch.channels_last)
    n, _, h, w = z.shape
    side = family.spatial_factor
    low, high = family.pixel_range
    levels = 255 if task.bits == 8 else 65535
    host = torch.empty(
        (n, h * side, w * side, 3),
        dtype=torch.uint8 if task.bits == 8 else torch.int32,
        pin_memory=batch.device.type == "cuda",
    )
    finite = torch.ones(n, dtype=torch.bool, device=batch.device)
    for row, band in execute(execution, module.decode, z, check=check):
        finite &= band.isfinite().flatten(1).all(dim=1)
        picture = band.float().sub_(low).mul_(levels / (high - low)).clamp_(0, levels).round_().to(host.dtype)
        host[:, row : row + band.shape[2]].copy_(picture.permute(0, 2, 3, 1), non_blocking=True)
    flags: list[bool] = finite.tolist()  # waits for the copies too: same stream
    pictures = host.numpy() if task.bits == 8 else host.numpy().astype(np.uint16)
    return Outcome(list(pictures), flags)
