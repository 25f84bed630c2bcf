"""The arithmetic of a batch on its device: arrays in, network, arrays out.

Pure functions, called on a device thread.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.engine.jobs import Numbers, Output, Task
from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.errors import InvalidImage, Unavailable
from app.execution.banded import STRIPS, AnyExecution, Banded, execute, gather
from app.execution.causal import Carry
from app.execution.primitive import AttentionBlock, Whole
from app.execution.slices import Sliced
from app.vae.autoencoder import Autoencoder

OUTPUTS: dict[Output, tuple[int, torch.dtype]] = {
    "uint8": (255, torch.uint8),
    "uint16": (65535, torch.int32),
    "float16": (0, torch.float16),
    "float32": (0, torch.float32),
}
"""Levels of a picture, 0 for none, and the dtype that they have on their way: torch computes nothing in uint16."""

NUMBERS: dict[Numbers, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}

AHEAD = 4
"""Layers or bands that the host may be ahead of a CUDA device: enough that the device never waits for it."""

Check = Callable[[], None]
"""Called between bands, and between the layers of a whole run; raises to cancel."""


class Cancelled(Exception):
    """Everyone who waited for the batch has gone."""


@dataclass(frozen=True)
class Failure:
    """Why a forward gave nothing."""

    kind: Literal["oom", "cancelled", "lost", "error"]
    error: Exception


@dataclass(frozen=True)
class Outcome:
    """The items of one forward, and which of them are finite in every element, before it and after."""

    arrays: list[np.ndarray]
    fits: list[bool]
    """Whether the network's input was finite in the precision that it ran in: only then is the output its own doing."""
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


class Paced:
    """A check on a device that runs behind its host, where what is enqueued cannot be taken back: it is kept short."""

    def __init__(self, check: Check, device: torch.device) -> None:
        self._check = check
        self._device = device
        self._enqueued: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        """Waits until the device is at most `AHEAD` checks behind, then checks."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._enqueued.append(event)
        if len(self._enqueued) > AHEAD:
            self._enqueued.popleft().synchronize()
        self._check()


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


def classify(error: Exception, device: torch.device) -> Failure:
    """What a failure means; whether the device is lost is asked of the device itself."""
    if isinstance(error, Cancelled):
        return Failure("cancelled", error)
    if out_of_memory(error):
        return Failure("oom", error)
    suspect = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return Failure("lost" if suspect and _broken(device) else "error", error)


def _broken(device: torch.device) -> bool:
    try:
        probe(device)
    except (RuntimeError, Unavailable):
        return True
    return False


@torch.inference_mode()
def forward(module: Autoencoder, inputs: list[Tensor], tasks: list[Task], plan: ExecutionPlan, check: Check) -> Outcome:
    """One forward of items that share a batch key.

    Inputs are uint8 (H, W, C), or floating in [-1, 1], to encode, floating (C, h, w) to decode, on the module's device.
    Outputs are `Result.array`, on the host. Raises InvalidImage for pixels that are not finite.
    """
    task = tasks[0]
    batch = torch.stack(inputs)
    if batch.device.type == "cuda":
        check = Paced(check, batch.device)
    execution = execution_of(plan, check)
    if task.op == "encode":
        return _encode(module, batch, tasks, plan, execution, check)
    return _decode(module, batch, task, plan, execution, check, len(batch))


@torch.inference_mode()
def forward_slice(
    module: Autoencoder, frames: Tensor, task: Task, plan: ExecutionPlan, carry: Carry | None, check: Check
) -> Outcome:
    """The next slice of one clip, as one item; `carry` is what the slice before it left, and is left anew.

    Without one the frames are the whole clip.

    Frames are uint8 (T, H, W, C), or floating in [-1, 1], to encode, floating (C, t, h, w) to decode.
    """
    if frames.device.type == "cuda":
        check = Paced(check, frames.device)
    whole, factor = plan.execution == "whole", task.checkpoint.temporal_factor
    execution = Sliced(deque() if carry is None else carry, check) if whole else execution_of(plan, check)
    before = 0 if carry else factor - 1  # frames that the first one lacks of a whole latent's
    if task.op == "encode":
        count = (len(frames) + before) // factor
        found = _encode(module, frames, [task] * count, plan, execution, check, carry)
    else:
        latents = frames.transpose(0, 1)
        found = _decode(module, latents, task, plan, execution, check, factor * len(latents) - before, carry)
    array = np.stack(found.arrays, axis=1 if task.op == "encode" else 0)
    return Outcome([array], [all(found.fits)], [all(found.finite)])


def _encode(
    module: Autoencoder,
    batch: Tensor,
    tasks: list[Task],
    plan: ExecutionPlan,
    execution: AnyExecution,
    check: Check,
    carry: Carry | None = None,
) -> Outcome:
    pixels = _pixels(batch, tasks[0].checkpoint.family.pixel_range).to(TORCH_DTYPES[plan.dtype])
    # Bytes fit every precision.
    fits = pixels.isfinite().flatten(1).all(dim=1).tolist() if batch.is_floating_point() else [True] * len(tasks)
    moments = gather(execution, module.encode, pixels, check=check, carry=carry).float()
    arrays, finite = [], []
    for index, task in enumerate(tasks):
        found = _found(module, moments[index : index + 1], task)[0].to(NUMBERS[task.numbers]).contiguous()
        finite.append(bool(found.isfinite().all()))
        arrays.append(found.cpu().numpy())
    return Outcome(arrays, fits, finite)


def _pixels(batch: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    """Pictures (B, H, W, C) as (B, C, H, W) in the network's range, alpha as the colours.

    In float32, before the cast: half formats have no room for it afterwards.
    """
    low, high = pixel_range
    pixels = batch.permute(0, 3, 1, 2)
    if not batch.is_floating_point():
        return pixels.float().mul_((high - low) / 255).add_(low)
    if not pixels.isfinite().all():
        raise InvalidImage("the picture has pixels that are NaN or infinite")
    return pixels.float().mul_((high - low) / 2).add_((high + low) / 2)


def _found(module: Autoencoder, moments: Tensor, task: Task) -> Tensor:
    """What a task wants of one item's moments."""
    if task.moments:
        return moments
    posterior = module.posterior(moments)
    if task.seed is None:
        z = posterior.mode()
    else:
        z = posterior.sample(torch.Generator().manual_seed(task.seed))
    return task.checkpoint.family.latent_format.scale(z, module.bn) if task.latents == "scaled" else z


def _decode(
    module: Autoencoder,
    batch: Tensor,
    task: Task,
    plan: ExecutionPlan,
    execution: AnyExecution,
    check: Check,
    count: int,
    carry: Carry | None = None,
) -> Outcome:
    """`count` pictures of a batch of latents."""
    family = task.checkpoint.family
    z = batch.float()
    if task.latents == "scaled":
        z = family.latent_format.unscale(z, module.bn)
    z = z.to(TORCH_DTYPES[plan.dtype]).contiguous(memory_format=torch.channels_last)
    fits: list[bool] = z.isfinite().flatten(1).all(dim=1).tolist()
    _, _, h, w = z.shape
    side = family.spatial_factor
    low, high = family.pixel_range
    levels, on_host = OUTPUTS[task.output]
    channels = module.config.pixel_channels
    host = torch.empty((count, h * side, w * side, channels), dtype=on_host, pin_memory=batch.device.type == "cuda")
    finite = torch.ones(count, dtype=torch.bool, device=batch.device)
    for row, band in execute(execution, module.decode, z, check=check, carry=carry):
        finite &= band.isfinite().flatten(1).all(dim=1)
        if levels:
            picture = band.float().sub_(low).mul_(levels / (high - low)).clamp_(0, levels).round_().to(host.dtype)
        else:
            picture = band.float().sub_(low).mul_(2 / (high - low)).sub_(1).to(host.dtype)
            finite &= picture.isfinite().flatten(1).all(dim=1)  # half precision may not hold it
        host[:, row : row + band.shape[2]].copy_(picture.permute(0, 2, 3, 1), non_blocking=True)
    flags: list[bool] = finite.tolist()  # waits for the copies too: same stream
    return Outcome(list(host.numpy().astype(task.output, copy=False)), fits, flags)
