import asyncio
import gc
import weakref

import pytest
import torch
from prometheus_client import CollectorRegistry

from app.engine.cache import ModelCache
from app.engine.memory import FixedMemory
from app.errors import ModelBusy, OutOfMemory, UnsupportedCheckpoint
from app.metrics import DeviceMetrics, Metrics
from tests.fakes import checkpoint, load

A, B, C = (checkpoint(name) for name in "abc")
BYTES = A.weight_bytes(torch.float32)


class Loader:
    """Counts loads; the next ones wait at a gate or fail."""

    def __init__(self):
        self.loads = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error = None

    async def __call__(self, checkpoint, dtype):
        self.loads.append((checkpoint.name, dtype))
        await self.gate.wait()
        if self.error:
            raise self.error
        return load(checkpoint, torch.float32, torch.device("cpu"))


def cache_of(loader, room, limit=None):
    metrics = Metrics(CollectorRegistry())
    return ModelCache(loader, FixedMemory(room), limit, DeviceMetrics(metrics, "cpu"), "cpu"), metrics


async def use(cache, model, dtype="fp32"):
    resident = await cache.acquire(model, dtype)
    cache.release(resident)
    return resident


def names(cache):
    return [resident.checkpoint.name for resident in cache.residents()]


async def test_a_hundred_requests_for_a_cold_model_load_it_once():
    loader = Loader()
    cache, metrics = cache_of(loader, 10 * BYTES)
    loader.gate.clear()
    waiting = [asyncio.ensure_future(cache.acquire(A, "fp32")) for _ in range(100)]
    await asyncio.sleep(0)
    loader.gate.set()
    residents = await asyncio.gather(*waiting)
    assert loader.loads == [("a", "fp32")]
    assert set(residents) == {residents[0]}
    assert residents[0].in_use == 100
    assert metrics.registry.get_sample_value("vae_model_loads_total", {"device": "cpu", "result": "ok"}) == 1


async def test_precision_is_part_of_the_key():
    loader = Loader()
    cache, _ = cache_of(loader, 10 * BYTES)
    assert await use(cache, A, "fp32") is not await use(cache, A, "fp16")
    assert cache.nbytes == BYTES + BYTES // 2


async def test_least_recently_used_goes_first_and_its_memory_before_the_next_load():
    loader = Loader()
    cache, metrics = cache_of(loader, 2 * BYTES)
    module = weakref.ref((await use(cache, A)).module)
    await use(cache, B)
    await use(cache, A)  # B is now the oldest
    await use(cache, C)
    assert names(cache) == ["a", "c"]
    await use(cache, B)
    gc.collect()
    assert names(cache) == ["c", "b"]
    assert module() is None
    assert metrics.registry.get_sample_value("vae_model_evictions_total", {"device": "cpu", "reason": "memory"}) == 2


async def test_what_is_in_use_or_pinned_stays():
    cache, _ = cache_of(Loader(), 2 * BYTES)
    held = await cache.acquire(A, "fp32")
    await use(cache, B)
    cache.pin(B.sha256)
    with pytest.raises(OutOfMemory, match=f"take {BYTES} bytes"):
        await use(cache, C)
    cache.release(held)
    await use(cache, C)
    assert names(cache) == ["b", "c"]


async def test_the_byte_limit_holds_even_where_the_device_has_more():
    cache, _ = cache_of(Loader(), 10 * BYTES, limit=BYTES)
    await use(cache, A)
    await use(cache, B)
    assert names(cache) == ["b"]


async def test_room_is_what_may_come_without_an_eviction():
    cache, _ = cache_of(Loader(), 10 * BYTES, limit=2 * BYTES)
    assert cache.room == 2 * BYTES
    await use(cache, A)
    assert cache.room == BYTES
    for each in (B, C):
        await use(cache, each)
    assert cache.room == 0
    wide, _ = cache_of(Loader(), 2 * BYTES, limit=10 * BYTES)  # the device has less than the limit
    await use(wide, A)
    assert wide.room == BYTES


async def test_memory_reserved_for_a_running_batch_is_not_free():
    cache, _ = cache_of(Loader(), 3 * BYTES)
    with pytest.raises(OutOfMemory):
        await cache.acquire(A, "fp32", reserved=2 * BYTES + 1)
    await cache.acquire(A, "fp32", reserved=2 * BYTES)


async def test_a_failed_load_fails_its_own_waiters_only_and_is_tried_again():
    loader = Loader()
    cache, metrics = cache_of(loader, 10 * BYTES)
    loader.error = UnsupportedCheckpoint("torn")
    results = await asyncio.gather(cache.acquire(A, "fp32"), cache.acquire(A, "fp32"), return_exceptions=True)
    assert [type(result) for result in results] == [UnsupportedCheckpoint] * 2
    loader.error = None
    await use(cache, A)
    assert loader.loads == [("a", "fp32")] * 2
    assert metrics.registry.get_sample_value("vae_model_loads_total", {"device": "cpu", "result": "error"}) == 1


async def test_a_waiter_that_gives_up_does_not_take_the_load_with_it():
    loader = Loader()
    cache, _ = cache_of(loader, 10 * BYTES)
    loader.gate.clear()
    first, second = (asyncio.ensure_future(cache.acquire(A, "fp32")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    loader.gate.set()
    assert (await second).in_use == 1
    assert len(loader.loads) == 1


async def test_unload():
    cache, _ = cache_of(Loader(), 10 * BYTES)
    held = await cache.acquire(A, "fp32")
    with pytest.raises(ModelBusy, match="in use"):
        cache.unload(A.sha256)
    cache.release(held)
    cache.pin(A.sha256)
    with pytest.raises(ModelBusy, match="pinned"):
        cache.unload(A.sha256)
    cache.unpin(A.sha256)
    assert cache.unload(A.sha256) == BYTES
    assert cache.unload(A.sha256) == 0
    assert not cache.residents()


async def test_make_room_evicts_only_what_is_needed():
    cache, _ = cache_of(Loader(), 3 * BYTES)
    for model in (A, B, C):
        await use(cache, model)
    assert cache.evictable == 3 * BYTES
    assert cache.make_room(BYTES)
    assert names(cache) == ["b", "c"]
    assert not cache.make_room(4 * BYTES)


async def test_weights_on_their_way_are_not_free_memory():
    loader = Loader()
    cache, _ = cache_of(loader, 3 * BYTES)
    loader.gate.clear()
    loading = asyncio.ensure_future(cache.acquire(A, "fp32"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert cache.free == 2 * BYTES
    loader.gate.set()
    await loading
    assert cache.free == 2 * BYTES


async def test_a_load_that_runs_out_of_memory_is_tried_once_more_in_an_empty_cache():
    loader = Loader()
    cache, metrics = cache_of(loader, 10 * BYTES)
    await use(cache, A)
    loader.error = torch.OutOfMemoryError("no")
    with pytest.raises(OutOfMemory, match=f"take {BYTES} bytes"):
        await use(cache, B)
    assert loader.loads == [("a", "fp32"), ("b", "fp32"), ("b", "fp32")]
    assert names(cache) == []
    assert cache.free == 10 * BYTES
    assert metrics.registry.get_sample_value("vae_model_loads_total", {"device": "cpu", "result": "error"}) == 1


async def test_an_error_that_nobody_waits_for_is_not_complained_about(caplog):
    loader = Loader()
    cache, _ = cache_of(loader, 10 * BYTES)
    loader.gate.clear()
    waiting = asyncio.ensure_future(cache.acquire(A, "fp32"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    loader.error = UnsupportedCheckpoint("torn")
    loader.gate.set()
    for _ in range(5):
        await asyncio.sleep(0)
    del waiting
    gc.collect()
    assert loader.loads
    assert not caplog.records
