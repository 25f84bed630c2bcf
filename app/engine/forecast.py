"""How much memory a plan will take, before a byte of it is allocated.

The network itself runs on torch's `meta` device, where tensors have shapes but no storage, under a mode that counts
the bytes that would be alive. What was measured on the device afterwards corrects the next forecast.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.execution.banded import Banded, forecast_bytes
from app.execution.causal import WHOLE_CLIP, Carry, Slice
from app.execution.primitive import Network, Whole
from app.execution.slices import Sliced
from app.store.checkpoint import Checkpoint, blank
from app.terms import Op
from app.vae.architectures import architecture_of
from app.vae.autoencoder import Config
from app.vae.kernels import add_kernels

MARGIN = 1.05
"""Over the counted bytes: the allocator's rounding. What was allocated was measured at 0.97 to 1.00 of the count."""

OVERHEAD = 5 << 20
"""Over all: what libraries set up for themselves in the first run of a shape, whatever the size of the picture."""

REMEMBERED = 4096  # counts kept: the shapes of bands and clips come from requests, so there is no end to them

SIDES = (64, 256, 1024)
"""Of the square pictures, in pixels, whose whole runs are counted: any other area lies between two of them, or beyond.

Maps grow with the area and kernels' copies of weights do not, and whichever moment is the peak, it is so on a stretch:
a line between two counts is at most above what lies between. Prepared kernels work in tiles, and small pictures
have few: up to 128 px SD's line is 4 % below, 1.5 MB that MARGIN and OVERHEAD cover; from 192 px on it is within 0.5 %.
"""

TELLING = 256 << 20
"""A measured peak above the overhead corrects others if the forecast is at least so large."""

CORRECTION_RANGE = (0.8, 2.0)


CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
)
"""What a mode sees of a convolution: with autograd the first, in inference mode the others."""


class CountingMode(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive, and the most there ever were.

    While a convolution runs, its kernel's own copy of the weights counts too.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        self.alive = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        if func in CONVOLUTIONS:
            weight: Tensor = args[1]
            self.peak = max(self.peak, self.alive + weight.nbytes)  # oneDNN and cuDNN reorder it for each call
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.alive -= nbytes


@dataclass(frozen=True)
class NetworkShape:
    """What decides a forecast: the network, the direction, and one item's array on the network's side."""

    config: Config
    op: Op
    channels: int
    height: int
    width: int
    itemsize: int = 1  # bytes of each number of the picture, whichever side it is on
    kernels: bool = False  # those of its convolutions are prepared, where it runs in float32
    frames: int | None = None  # on the network's side, of a clip that runs as one slice; None: a slice in its midst


def network_shape(checkpoint: Checkpoint, op: Op, height: int, width: int, itemsize: int = 1) -> NetworkShape:
    """The shape of a picture of height x width pixels as the network takes it."""
    if op == "encode":
        return NetworkShape(checkpoint.config, op, checkpoint.config.pixel_channels, height, width, itemsize)
    side, channels = checkpoint.family.spatial_factor, checkpoint.family.latent_channels
    return NetworkShape(checkpoint.config, op, channels, height // side, width // side, itemsize)


class Forecaster:
    """Peaks by shape and plan on one kind of device; safe to call from any thread."""

    def __init__(self, device: str) -> None:
        self._lock = threading.Lock()  # of the corrections
        self._corrections: dict[tuple[Any, Op, str], float] = {}
        self._device = torch.device(device)
        self._counting = threading.Lock()  # two threads at once under torch's modes on `meta` were seen to crash
        self._counted = lru_cache(REMEMBERED)(self._count)

    def peak(self, shape: NetworkShape, plan: ExecutionPlan) -> int:
        """Bytes of working memory, weights not included; of recompute, the least."""
        return int(self._bytes(shape, plan) * self._factor(shape, plan)) + OVERHEAD

    def budget(self, shape: NetworkShape, plan: ExecutionPlan, available: int) -> int:
        """The bytes that an execution may count on, for its peak to be `available`."""
        ends = _ends(shape, plan, *_items(shape, plan), self._device)
        return int((available - OVERHEAD) / self._factor(shape, plan)) - ends

    def measured(self, shape: NetworkShape, plan: ExecutionPlan, peak: int) -> None:
        """Takes note of a real peak: later forecasts of the same network and mode follow it upwards at once.

        Small ones say nothing (there the overhead is most of it), nor do those of recompute with a budget.
        """
        counted = self._bytes(shape, plan) if plan.budget is None else 0
        if counted < TELLING:
            return
        seen = (peak - OVERHEAD) / (counted * MARGIN)
        low, high = CORRECTION_RANGE
        key = (shape.config, shape.op, str(plan))
        with self._lock:
            old = self._corrections.get(key, 1.0)
            self._corrections[key] = min(high, max(low, seen if seen > old else 0.9 * old + 0.1 * seen))

    def _count(self, shape: NetworkShape, plan: ExecutionPlan) -> int:
        with self._counting:
            return count(shape, plan, self._device)

    def _bytes(self, shape: NetworkShape, plan: ExecutionPlan) -> int:
        """As counted, or between what was."""
        if not self._by_area(shape, plan):
            return self._counted(shape, plan)
        area = plan.batch * shape.height * shape.width
        last = len(SIDES) - 2
        index = next((each for each in range(last) if area < _side(shape, each + 1) ** 2), last)
        low, high = _side(shape, index) ** 2, _side(shape, index + 1) ** 2
        below, above = (self._maps(shape, plan, each) for each in (index, index + 1))
        maps = below + max(0, area - low) * (above - below) // (high - low)
        return maps + _ends(shape, plan, *_items(shape, plan), self._device)

    def _by_area(self, shape: NetworkShape, plan: ExecutionPlan) -> bool:
        """Whether the area of a batch tells what it takes: of whole runs of pictures, not of clips."""
        return plan.execution == "whole" and architecture_of(shape.config).temporal_factor == 1

    def _maps(self, shape: NetworkShape, plan: ExecutionPlan, index: int) -> int:
        """Of a picture of one of SIDES, the arrays at both ends not counted."""
        side = _side(shape, index)
        square, one = replace(shape, height=side, width=side, itemsize=1), replace(plan, batch=1)
        return self._counted(square, one) - _ends(square, one, 1, 1, self._device)

    def _factor(self, shape: NetworkShape, plan: ExecutionPlan) -> float:
        return MARGIN * self._corrections.get((shape.config, shape.op, str(plan)), 1.0)


def _side(shape: NetworkShape, index: int) -> int:
    """One of SIDES on the network's side."""
    return SIDES[index] // (1 if shape.op == "encode" else shape.config.spatial_factor)


def count(shape: NetworkShape, plan: ExecutionPlan, device: torch.device) -> int:
    """Peak bytes of a plan: Whole by running it on `meta`, the banded executions by their own arithmetic.

    Of a network for clips it is that of a slice in their midst, of one latent, with all that is carried, or of the
    whole clip as one slice, of which nothing is.
    """
    dtype = TORCH_DTYPES[plan.dtype]
    module = blank(shape.config)
    if shape.kernels and plan.dtype == "fp32":
        add_kernels(module)
    network = module.encode if shape.op == "encode" else module.decode
    items, pictures = _items(shape, plan)
    ends = _ends(shape, plan, items, pictures, device)
    size = (items, shape.channels, shape.height, shape.width)
    clips = architecture_of(shape.config).temporal_factor > 1
    if plan.execution != "whole":
        place = WHOLE_CLIP if not clips or shape.frames else Slice(first=False, last=False)
        return forecast_bytes(Banded(plan.execution), network, size, dtype, device, place) + ends
    module.to(dtype)
    if clips:
        mode = CountingMode(module.state_dict().values())
        return _count_slice(network, size, dtype, device, mode, shape.frames is None) + ends
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's annotation lacks memory_format
    mode = CountingMode(module.state_dict().values())
    x = torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)
    with mode, torch.inference_mode():
        network(Whole(), x)
    return mode.peak + ends


def _count_slice(
    network: Network,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    mode: CountingMode,
    in_midst: bool,
) -> int:
    """Peak bytes of the maps of a slice, and of what is carried from it and, `in_midst`, to it."""
    carry: Carry = deque()
    for frames in (1, size[0]) if in_midst else size[:1]:
        x = torch.empty((frames, *size[1:]), dtype=dtype, device="meta", memory_format=torch.channels_last)
        with mode, torch.inference_mode():
            network(Sliced(carry, device=device), x)
    return mode.peak


def _items(shape: NetworkShape, plan: ExecutionPlan) -> tuple[int, int]:
    """Maps that the network takes at once, and pictures that these are or become."""
    factor, encodes = architecture_of(shape.config).temporal_factor, shape.op == "encode"
    if factor == 1:
        return plan.batch, plan.batch
    if shape.frames is None:
        return factor if encodes else 1, factor
    return shape.frames, shape.frames if encodes else 1 + factor * (shape.frames - 1)


def _ends(shape: NetworkShape, plan: ExecutionPlan, items: int, pictures: int, device: torch.device) -> int:
    """Bytes of the arrays at both ends of the network, which are there from the beginning to the end.

    To encode: the pictures as they came, one by one and as a batch, and the batch in the network's dtype. To decode:
    the same of the latents, in float32 too, and the pictures, which are the host's and count where that is the device.
    """
    numbers = items * shape.height * shape.width * shape.channels
    itemsize = TORCH_DTYPES[plan.dtype].itemsize
    if shape.op == "encode":
        return numbers * (2 * shape.itemsize + itemsize)
    pixels = pictures * shape.height * shape.width * shape.config.spatial_factor**2
    on_host = pixels * shape.config.pixel_channels * shape.itemsize
    return numbers * (3 * torch.float32.itemsize + itemsize) + (on_host if device.type == "cpu" else 0)
