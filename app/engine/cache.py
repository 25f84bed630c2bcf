"""The models on one device: least recently used by bytes, counted references, each loaded once at a time.

Lives on the event loop: no locks. Precision is part of the key; a resident module is never cast.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch

from app.engine.jobs import Clip
from app.engine.kernels import Kernels
from app.engine.memory import DeviceMemory
from app.engine.planning import TORCH_DTYPES
from app.errors import ModelBusy, OutOfMemory
from app.metrics import DeviceMetrics
from app.store.checkpoint import Checkpoint
from app.terms import Dtype
from app.vae.autoencoder import Autoencoder, Config

Key = tuple[str, Config, Dtype]
"""The bytes of the weights, what network they are taken for, and the precision."""
Load = Callable[[Checkpoint, Dtype], Awaitable[Autoencoder]]


@dataclass(eq=False)
class Resident:
    """A module on the device. `in_use` counts the batches that hold it; it is not evicted before they let go."""

    checkpoint: Checkpoint
    dtype: Dtype
    module: Autoencoder
    nbytes: int
    in_use: int = 0


class ModelCache:
    """Modules by sha256, configuration and dtype, oldest use first."""

    def __init__(
        self, load: Load, memory: DeviceMemory, limit: int | None, metrics: DeviceMetrics, device: str
    ) -> None:
        self._load_module = load
        self._memory = memory
        self._limit = limit if limit is not None else memory.capacity()
        self._metrics = metrics
        self.kernels = Kernels(device, min(self._limit, memory.capacity()))
        self._residents: dict[Key, Resident] = {}  # an OrderedDict would hash every key of a walk
        self._loading: dict[Key, asyncio.Task[None]] = {}
        self.loads = 0  # begun so far
        self._promised = 0  # bytes of the weights being loaded
        self._pinned: set[str] = set()
        self.clips: WeakSet[Clip] = WeakSet()  # whose carries lie on the device

    @property
    def nbytes(self) -> int:
        """Bytes of all resident weights."""
        return sum(resident.nbytes for resident in self._residents.values())

    @property
    def taken(self) -> int:
        """Bytes of all resident weights, and of what clips carry from slice to slice."""
        return self.nbytes + sum(clip.held for clip in self.clips)

    @property
    def free(self) -> int:
        """Bytes of the device that nobody has, weights on their way counted as there."""
        return self._memory.free(self.taken) - self._promised

    @property
    def room(self) -> int:
        """Bytes that further weights may take without an eviction."""
        return max(0, min(self.free, self._limit - self.nbytes - self._promised))

    @property
    def evictable(self) -> int:
        """Bytes of weights that nobody uses or has pinned."""
        return sum(resident.nbytes for resident in self._residents.values() if self._idle(resident))

    def bytes_of(self, checkpoint: Checkpoint, dtype: Dtype) -> int:
        """Bytes that a checkpoint takes while it is resident: of its weights, and of its kernels where it has some."""
        return checkpoint.weight_bytes(TORCH_DTYPES[dtype]) + self.kernels.nbytes(checkpoint, dtype)

    def residents(self) -> list[Resident]:
        """All residents, oldest use first."""
        return list(self._residents.values())

    def holds(self, checkpoint: Checkpoint, dtype: Dtype | None = None) -> bool:
        """Whether the checkpoint is resident in this precision, or in any."""
        wanted = _key(checkpoint, dtype or "fp32")[:2]
        return any(key[:2] == wanted and dtype in (None, key[2]) for key in self._residents)

    def kept(self, checkpoint: Checkpoint, dtype: Dtype) -> bool:
        """Whether the module is resident and not to be evicted now."""
        resident = self._residents.get(_key(checkpoint, dtype))
        return resident is not None and not self._idle(resident)

    @property
    def weights(self) -> tuple[int, int] | None:
        """Loads begun so far and bytes resident, to see whether any came or went; None while some are on their way."""
        return None if self.loading else (self.loads, self.nbytes)

    @property
    def loading(self) -> bool:
        """Whether weights are on their way."""
        return bool(self._loading)

    def pinned(self, sha256: str) -> bool:
        """Whether the checkpoint must not be evicted."""
        return sha256 in self._pinned

    async def acquire(self, checkpoint: Checkpoint, dtype: Dtype, reserved: int = 0) -> Resident:
        """The module, loaded if need be; the caller must `release` it.

        `reserved` bytes of free memory belong to somebody else. Concurrent calls load once, and share an error:
        UnsupportedCheckpoint, or OutOfMemory when the weights do not fit beside what is in use.
        """
        key = _key(checkpoint, dtype)
        while key not in self._residents:
            if key not in self._loading:
                self._loading[key] = asyncio.create_task(self._load(checkpoint, dtype, reserved))
                self._loading[key].add_done_callback(_retrieve)
            await asyncio.shield(self._loading[key])
        resident = self._residents[key] = self._residents.pop(key)  # the last one now
        resident.in_use += 1
        return resident

    def release(self, resident: Resident) -> None:
        """Lets go of what `acquire` gave."""
        resident.in_use -= 1

    def make_room(self, nbytes: int, reserved: int = 0, limit: int | None = None) -> bool:
        """Evicts idle residents, oldest first, until `nbytes` are free (and weights stay within `limit`)."""

        def enough() -> bool:
            fits = self.free - reserved >= nbytes
            return fits and (limit is None or self.nbytes + self._promised <= limit)

        for resident in self.residents():
            if enough():
                break
            if self._idle(resident):
                self._evict(resident, "memory")
        return enough()

    def pin(self, sha256: str) -> None:
        """Keeps the checkpoint resident once it is."""
        self._pinned.add(sha256)

    def unpin(self, sha256: str) -> None:
        """Allows eviction again."""
        self._pinned.discard(sha256)

    def unload(self, sha256: str) -> int:
        """Evicts a checkpoint in every precision; bytes freed. Raises ModelBusy when it is in use or pinned."""
        mine = [resident for resident in self.residents() if resident.checkpoint.sha256 == sha256]
        if sha256 in self._pinned:
            raise ModelBusy("the model is pinned: unpin it first")
        if any(resident.in_use for resident in mine):
            raise ModelBusy("the model is in use: try again when its requests are done")
        for resident in mine:
            self._evict(resident, "unload")
        return sum(resident.nbytes for resident in mine)

    def _idle(self, resident: Resident) -> bool:
        return not resident.in_use and resident.checkpoint.sha256 not in self._pinned

    def _evict(self, resident: Resident, reason: str) -> None:
        del self._residents[_key(resident.checkpoint, resident.dtype)]
        self._memory.evicted()
        self._metrics.evictions(reason).inc()

    async def _load(self, checkpoint: Checkpoint, dtype: Dtype, reserved: int) -> None:
        key = _key(checkpoint, dtype)
        nbytes = self.bytes_of(checkpoint, dtype)
        self.loads += 1
        started = time.monotonic()
        try:
            if not self.make_room(nbytes, reserved, self._limit - nbytes):
                raise self._no_room(checkpoint, dtype, nbytes, reserved)
            self._promised += nbytes
            try:
                module = await self._try(checkpoint, dtype)
                if module is None:  # the forecast of free memory was wrong: once more, in all the room there is
                    self.make_room(self._memory.capacity())
                    self._memory.release()
                    module = await self._try(checkpoint, dtype)
            finally:
                self._promised -= nbytes
            if module is None:
                raise self._no_room(checkpoint, dtype, nbytes, reserved)
        except BaseException:
            self._metrics.loads("error").inc()
            raise
        finally:
            del self._loading[key]
        self._residents[key] = Resident(checkpoint, dtype, module, nbytes)
        self._metrics.loads("ok").inc()
        self._metrics.load_seconds.observe(time.monotonic() - started)

    async def _try(self, checkpoint: Checkpoint, dtype: Dtype) -> Autoencoder | None:
        """The module; None where the device had no room for it."""
        try:
            return await self._load_module(checkpoint, dtype)
        except torch.OutOfMemoryError:
            return None  # what comes next must not run in this block: the traceback holds what was loaded so far

    def _no_room(self, checkpoint: Checkpoint, dtype: Dtype, nbytes: int, reserved: int) -> OutOfMemory:
        return OutOfMemory(
            f"the weights of {checkpoint.name} take {nbytes} bytes in {dtype}; "
            f"{max(0, self.free - reserved)} are free and nothing idle is left to evict"
        )


def _key(checkpoint: Checkpoint, dtype: Dtype) -> Key:
    return checkpoint.sha256, checkpoint.config, dtype


def _retrieve(loading: asyncio.Task[None]) -> None:
    """Looks at the error of a load that nobody waits for any more, or asyncio would complain."""
    if not loading.cancelled():
        loading.exception()
