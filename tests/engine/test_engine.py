import asyncio
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from app.engine.batcher import QueueLimits
from app.engine.devices import device_names
from app.engine.jobs import Task
from app.engine.turns import Turn
from app.errors import InvalidImage, InvalidLatent, OutOfMemory, Unavailable, UnsupportedCheckpoint
from app.execution import banded as strips
from tests.fakes import (
    FAMILY,
    SMALL,
    Forwards,
    checkpoint,
    latent,
    load,
    picture,
    running,
    submit,
    submit_all,
    until,
    value,
)

HOT, COLD = checkpoint("hot"), checkpoint("cold")
TOY = checkpoint("toy")
ONE = 256  # pixels of the picture of `latent()`
FOUR_A_BATCH = QueueLimits(items=256, pixels=1 << 26, batch_pixels=4 * ONE)
LEVELS = 1
"""Two float32 sums in another order differ by parts in a million: by one level of 255 at most, where it rounds."""


@pytest.fixture
def forwards(monkeypatch):
    return Forwards(monkeypatch)


class Loads:
    """Counts; fails or waits where it should."""

    def __init__(self):
        self.names = []
        self.broken = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, checkpoint, dtype, device):
        self.names.append(checkpoint.name)
        assert self.gate.wait(60)
        if checkpoint.name in self.broken:
            raise UnsupportedCheckpoint("torn")
        return load(checkpoint, dtype, device)


# -- turns, loads ---------------------------------------------------------------------------------------------------


async def test_a_hot_model_lets_another_one_in_after_one_batch(forwards):
    async with running(HOT, COLD, limits=FOUR_A_BATCH) as engine:
        await engine.load(COLD, "auto")
        with forwards.held():
            hot = asyncio.gather(*(submit(engine, Task("decode", HOT), latent()) for _ in range(50)))
            await until(
                lambda: forwards.log and engine.workers[0].batcher.items == 42
            )  # one batch is running, one staged
            cold = asyncio.ensure_future(submit(engine, Task("decode", COLD), latent()))
            await asyncio.sleep(0)
            assert [name for name, _, _ in forwards.log] == ["hot"]
        await cold
        await hot
        order = [name for name, _, _ in forwards.log]
        assert order.index("cold") == 2  # of the hot model, only the staged batch began after the arrival
        assert order.count("hot") == 13


async def test_while_a_model_is_loaded_those_that_are_there_go_on_and_then_it_is_next(forwards):
    loads = Loads()
    async with running(HOT, COLD, load=loads, limits=FOUR_A_BATCH) as engine:
        await submit(engine, Task("decode", HOT), latent())
        loads.gate.clear()
        cold = asyncio.ensure_future(submit(engine, Task("decode", COLD), latent()))
        await until(lambda: loads.names == ["hot", "cold"])
        await asyncio.gather(*(submit(engine, Task("decode", HOT), latent()) for _ in range(12)))
        assert not cold.done()
        with forwards.held():
            entered = len(forwards.log)
            more = [asyncio.ensure_future(submit(engine, Task("decode", HOT), latent())) for _ in range(40)]
            await until(lambda: len(forwards.log) > entered)
            loads.gate.set()
            await until(lambda: engine.workers[0].cache.holds(COLD))
        await cold
        await asyncio.gather(*more)
        names = [name for name, _, _ in forwards.log[entered:]]
        assert names.index("cold") <= 2  # behind the running batch and the one staged


async def test_a_model_that_finds_no_room_beside_the_others_is_made_way_for(forwards):
    """However many jobs of another model keep coming."""
    room = HOT.weight_bytes(torch.float32) + COLD.weight_bytes(torch.float32) - 1
    async with running(HOT, COLD, cache_bytes=room, limits=FOUR_A_BATCH) as engine:
        with forwards.held():
            hot = [asyncio.ensure_future(submit(engine, Task("decode", HOT), latent())) for _ in range(40)]
            await until(lambda: engine.workers[0]._staged is not None)
            cold = asyncio.ensure_future(submit(engine, Task("decode", COLD), latent()))
            await until(lambda: ("cold", "decode") in engine.workers[0].batcher.depths())
        await cold
        await asyncio.gather(*hot)
        names = [name for name, _, _ in forwards.log]
        assert names.index("cold") <= 3  # one batch more may be staged before it is known that there is no room
        assert value(engine, "vae_rejected_total", reason="vram") == 0


async def test_models_that_evict_each_other_under_load_lose_nothing():
    models = [checkpoint(name) for name in "abc"]
    async with running(*models, cache_bytes=models[0].weight_bytes(torch.float32) + 1000) as engine:

        async def client(number):
            for turn in range(12):
                await submit(engine, Task("decode", models[(number + turn) % 3]), latent())

        async with asyncio.timeout(60):
            await asyncio.gather(*(client(number) for number in range(9)))
        assert engine.workers[0].batcher.items == 0
        assert not any(resident.in_use for resident in engine.workers[0].cache.residents())


async def test_a_batch_does_not_wait_for_a_load_that_waits_for_it():
    """The load ran out of memory after all, and begins anew once nothing is taken: this batch is."""
    async with running(HOT, COLD) as engine:
        turns = engine.workers[0]._turns

        failed = asyncio.Event()

        async def load():
            await failed.wait()
            turns._making_way.set()
            await asyncio.Event().wait()

        loading = asyncio.ensure_future(load())
        turns.cold = Turn([], ("fp32",), loading)
        try:
            asyncio.get_running_loop().call_later(0.05, failed.set)
            assert await asyncio.wait_for(turns._put_back(), 10)
        finally:
            turns.cold = None
            loading.cancel()


async def test_a_load_that_is_stopped_ends_its_jobs():
    loads = Loads()
    loads.gate.clear()
    async with running(COLD, load=loads) as engine:
        waiting = asyncio.ensure_future(submit(engine, Task("decode", COLD), latent()))
        await until(lambda: bool(loads.names))
        stopping = asyncio.ensure_future(engine.drain(0.01))
        with pytest.raises(Unavailable):
            await waiting
        loads.gate.set()
        await stopping


async def test_a_queue_that_dies_is_a_lost_device_and_hangs_nobody(monkeypatch, caplog):
    async with running(TOY) as engine:
        monkeypatch.setattr(engine.workers[0].batcher, "take", lambda among: 1 / 0)
        with pytest.raises(Unavailable):  # taken by the call before, and its model is being loaded
            await submit(engine, Task("decode", TOY), latent())
        with pytest.raises(Unavailable):
            await submit(engine, Task("decode", TOY), latent())
        assert engine.lost is not None
        assert "division by zero" in engine.lost
        assert not engine.alive
        assert not engine.ready
    assert "serves nothing any more" in caplog.text


async def test_the_same_bytes_with_another_configuration_are_another_module():
    """A corrected norm_num_groups must not be answered by the module of before."""
    other = replace(TOY, config=replace(SMALL, norm_groups=2))
    async with running(TOY, other) as engine:
        (first,) = await submit(engine, Task("decode", TOY), latent())
        (second,) = await submit(engine, Task("decode", other), latent())
        assert np.abs(first.array.astype(int) - second.array).max() > 3
        assert len(engine.residencies(TOY.sha256)) == 2


async def test_a_cold_model_is_loaded_once_for_everybody():
    loads = Loads()
    async with running(TOY, load=loads) as engine:
        await asyncio.gather(*(submit(engine, Task("decode", TOY, deterministic=True), latent()) for _ in range(20)))
        assert loads.names == ["toy"]
        assert value(engine, "vae_model_loads_total", result="ok") == 1


async def test_a_failed_load_fails_its_own_requests_only():
    loads = Loads()
    loads.broken = {"cold"}
    async with running(HOT, COLD, load=loads) as engine:
        bad, good = await asyncio.gather(
            submit_all(engine, Task("decode", COLD), [latent(), latent()]),
            submit_all(engine, Task("decode", HOT), [latent(), latent()]),
        )
        assert [type(answer) for answer in bad] == [UnsupportedCheckpoint] * 2
        assert [answer.plan for answer in good] == ["fp32/whole"] * 2
        loads.broken = set()
        await submit(engine, Task("decode", COLD), latent())
        assert engine.workers[0].batcher.items == 0


async def test_load_pin_unload():
    async with running(HOT, COLD) as engine:
        await engine.load(HOT, "auto")
        engine.pin(HOT, True)
        (residency,) = engine.residencies(HOT.sha256)
        assert (residency.device, residency.dtype, residency.in_use, residency.pinned) == ("cpu", "fp32", 0, True)
        engine.pin(HOT, False)
        assert engine.unload(HOT) == residency.bytes == HOT.weight_bytes(torch.float32)
        assert engine.residencies(HOT.sha256) == []


# -- the end --------------------------------------------------------------------------------------------------------


async def test_a_drain_finishes_what_was_admitted_and_admits_nothing_more(forwards):
    async with running(HOT, COLD, limits=FOUR_A_BATCH) as engine:
        with forwards.held():
            work = [
                asyncio.ensure_future(submit(engine, Task("decode", model), latent()))
                for model in (HOT, COLD)
                for _ in range(10)
            ]
            await until(forwards.entered.is_set)
            draining = asyncio.ensure_future(engine.drain(60))
            await asyncio.sleep(0)
            assert not engine.ready
            with pytest.raises(Unavailable, match="shutting down"):
                await submit(engine, Task("decode", HOT), latent())
        await draining
        assert all(task.done() for task in work)
        assert {result.plan for task in work for result in task.result()} == {"fp32/whole"}
        assert value(engine, "vae_rejected_total", reason="draining") == 1
        assert value(engine, "vae_draining") == 1


async def test_what_a_drain_has_no_time_for_ends_as_unavailable(forwards):
    """Running, staged and queued jobs alike."""
    async with running(TOY, limits=FOUR_A_BATCH) as engine:
        with forwards.held():
            work = [asyncio.ensure_future(submit(engine, Task("decode", TOY), latent())) for _ in range(12)]
            await until(lambda: engine.workers[0].batcher.items == 4)
            draining = asyncio.ensure_future(engine.drain(0))
            answers = await asyncio.gather(*work, return_exceptions=True)
        await draining
        assert [type(answer) for answer in answers] == [Unavailable] * 12
        assert value(engine, "vae_batch_item_failures_total", reason="stopped") == 8
        assert engine.lost is None


async def test_an_engine_whose_thread_hangs_ends_all_the_same(forwards, monkeypatch):
    monkeypatch.setattr("app.engine.worker.STOP_SECONDS", 0.0)
    with forwards.held():
        async with running(TOY) as engine:
            waiting = asyncio.ensure_future(submit(engine, Task("decode", TOY), latent()))
            await until(forwards.entered.is_set)
        assert engine.lost == "its thread hangs"  # for the process to end at once, with a status that says so
        with pytest.raises(Unavailable):
            await waiting
    await until(lambda: not engine.workers[0].busy)


async def test_who_waits_for_a_file_to_be_replaced_waits_to_the_deadline_or_the_end():
    async with running(TOY) as engine:
        await asyncio.wait_for(engine.replaced(TOY, time.monotonic() + 0.05), 5)
        await asyncio.wait_for(engine.replaced(HOT, None), 5)  # the folder has none such
        waiting = asyncio.ensure_future(engine.replaced(TOY, None))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        await engine.drain(60)
        await asyncio.wait_for(waiting, 5)


# -- several devices ------------------------------------------------------------------------------------------------


def test_every_device_has_a_name_of_its_own():
    assert device_names(["cpu", "cpu"]) == ["cpu:0", "cpu:1"]
    assert device_names(["cpu"]) == ["cpu"]
    assert device_names(["cuda", "cuda:1"]) == ["cuda:0", "cuda:1"]


async def test_a_job_goes_where_its_model_is_and_elsewhere_when_that_is_sooner(forwards):
    async with running(HOT, COLD, devices=("cpu", "cpu"), limits=FOUR_A_BATCH) as engine:
        first, second = engine.workers
        for model, worker in ((HOT, first), (COLD, second)):
            worker.cache.release(await worker.cache.acquire(model, "fp32"))
        for model, name in ((COLD, "cpu:1"), (HOT, "cpu:0"), (COLD, "cpu:1"), (HOT, "cpu:0")):
            await submit(engine, Task("decode", model), latent())
            assert forwards.threads[-1] == name
        for worker in engine.workers:
            worker.rate.note(COLD.sha256, "decode", ONE, 100.0)
        with forwards.held():
            work = [asyncio.ensure_future(submit(engine, Task("decode", COLD), latent())) for _ in range(2)]
            await until(lambda: len(forwards.log) == 6)
        await asyncio.gather(*work)
        assert sorted(forwards.threads[4:]) == ["cpu:0", "cpu:1"]
        assert len(engine.residencies(COLD.sha256)) == 2


async def test_devices_of_one_host_share_its_memory():
    async with running(TOY) as one, running(TOY, devices=("cpu", "cpu")) as two:
        assert {worker.memory.capacity() for worker in two.workers} == {one.workers[0].memory.capacity() // 2}


# -- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode", "encode"])
async def test_a_deterministic_request_runs_alone_and_repeats_its_bits_under_load(forwards, op):
    arrays = [(latent if op == "decode" else picture)(seed=seed) for seed in range(6)]
    async with running(TOY) as engine:
        task = Task(op, TOY, deterministic=True)
        (alone,) = await submit(engine, task, arrays[0])
        with forwards.held():
            others = [asyncio.ensure_future(submit(engine, Task(op, TOY), array)) for array in arrays]
            again = asyncio.ensure_future(submit(engine, task, arrays[0]))
            await until(forwards.entered.is_set)
        (result,) = await again
        await asyncio.gather(*others)
        sizes = [items for _, _, items in forwards.log]
        assert max(sizes) > 1
        assert sizes[0] == 1
        assert sizes.count(1) >= 2  # alone before, and again
        assert np.array_equal(result.array, alone.array)


async def test_a_batched_picture_is_the_lone_one_but_for_rounding(forwards):
    arrays = [latent(seed=seed) for seed in range(4)]
    async with running(TOY) as engine:
        lone = [(await submit(engine, Task("decode", TOY), array))[0].array for array in arrays]
        batched = await submit(engine, Task("decode", TOY), *arrays)
        assert forwards.log[-1][2] == 4
        for result, expected in zip(batched, lone, strict=True):
            assert np.abs(result.array.astype(int) - expected).max() <= LEVELS
        assert all(np.abs(a.astype(int) - b).max() > LEVELS for a, b in pairwise(lone))  # each has its own


async def test_a_batched_latent_is_the_lone_one_but_for_rounding():
    arrays = [picture(seed=seed) for seed in range(4)]
    async with running(TOY) as engine:
        lone = [(await submit(engine, Task("encode", TOY, seed=7), array))[0].array for array in arrays]
        batched = await submit(engine, Task("encode", TOY, seed=7), *arrays)
        for result, expected in zip(batched, lone, strict=True):
            unit = np.spacing(np.abs(expected).max())  # the last place of the largest float16
            assert np.abs(result.array.astype(float) - expected).max() <= unit


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
async def test_in_half_precision_a_batch_moves_a_picture_by_less_than_the_precision_does(precision):
    arrays = [latent(seed=seed) for seed in range(4)]

    def deep(precision):
        return Task("decode", TOY, precision=precision, output="uint16")

    async with running(TOY) as engine:
        exact, lone = [
            [(await submit(engine, deep(each), array))[0].array for array in arrays] for each in ("fp32", precision)
        ]
        batched = await submit(engine, deep(precision), *arrays)
        for result, alone, right in zip(batched, lone, exact, strict=True):
            assert rms(result.array, alone) <= rms(alone, right)


def rms(a, b):
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


# -- memory limits --------------------------------------------------------------------------------------------------


@pytest.fixture
def fine_bands(monkeypatch):
    """Bands as small against these pictures as the real ones are against real pictures."""
    monkeypatch.setattr(strips, "CPU_BAND", 1 << 12)
    monkeypatch.setattr(strips, "SMALLEST_BAND", 1 << 12)
    monkeypatch.setattr("app.engine.forecast.OVERHEAD", 0)


async def peaks(side):
    """Forecast bytes by plan, from an engine without a limit."""
    async with running(TOY) as engine:
        return (await engine.plan(Task("decode", TOY), (4, side, side))).plans


async def test_the_plan_follows_the_memory_limit(fine_bands):
    small, large = await peaks(32), await peaks(64)
    whole, banded, least = (large[f"fp32/{name}"] for name in ("whole", "strips", "recompute"))
    assert small["fp32/whole"] < whole
    assert least < banded < whole
    weights = TOY.weight_bytes(torch.float32)
    async with running(TOY) as engine:
        expected = (await submit(engine, Task("decode", TOY), latent(64)))[0].array
    for room, plan in ((whole, "whole"), (whole - 1, "strips"), (banded - 1, "recompute"), (least, "recompute")):
        async with running(TOY, memory_limit_bytes=weights + room) as engine:
            (result,) = await submit(engine, Task("decode", TOY), latent(64))
            assert (result.plan, result.reason) == (f"fp32/{plan}", None if plan == "whole" else "low_memory")
            assert np.abs(result.array.astype(int) - expected).max() <= LEVELS
            answer = await engine.plan(Task("decode", TOY), (4, 64, 64))
            assert (answer.plan, answer.available_bytes) == (f"fp32/{plan}", room)
            assert value(engine, "vae_mode_executions_total", mode=f"fp32/{plan}") == 1
            if plan != "whole":
                labels = {"from": "whole", "to": plan, "reason": "low_vram"}
                assert value(engine, "vae_mode_fallbacks_total", **labels) == 1


async def test_the_smaller_picture_runs_whole_where_the_larger_one_does_not(fine_bands):
    small, large = await peaks(32), await peaks(64)
    room = (small["fp32/whole"] + large["fp32/whole"]) // 2
    async with running(TOY, memory_limit_bytes=TOY.weight_bytes(torch.float32) + room) as engine:
        results = [(await submit(engine, Task("decode", TOY), latent(side)))[0] for side in (32, 64, 32)]
        assert [result.plan for result in results] == ["fp32/whole", "fp32/strips", "fp32/whole"]


async def test_what_does_not_fit_at_all_is_refused_with_the_numbers(fine_bands):
    least = (await peaks(64))["fp32/recompute"]
    room = least - 1
    async with running(TOY, memory_limit_bytes=TOY.weight_bytes(torch.float32) + room) as engine:
        words = f"16384 pixels need {least} bytes in the smallest plan, fp32/recompute; {room} bytes are available"
        with pytest.raises(OutOfMemory, match=words):
            await submit(engine, Task("decode", TOY), latent(64))
        assert value(engine, "vae_rejected_total", reason="vram") == 1
        whole = (await peaks(64))["fp32/whole"]
        with pytest.raises(OutOfMemory, match=f"need {whole} bytes.*tiling=never forbids smaller plans"):
            await submit(engine, Task("decode", TOY, tiling="never"), latent(64))


async def test_the_weights_alone_may_be_too_much():
    async with running(TOY, memory_limit_bytes=1000) as engine:
        with pytest.raises(OutOfMemory, match="the weights of toy take"):
            await submit(engine, Task("decode", TOY), latent())


async def test_a_batch_is_as_large_as_fits(fine_bands, forwards):
    whole = (await peaks(32))["fp32/whole"]
    weights = TOY.weight_bytes(torch.float32)
    async with running(TOY, memory_limit_bytes=weights + 3 * whole) as engine:
        results = await submit(engine, Task("decode", TOY), *(latent(32, seed) for seed in range(8)))
        assert {result.plan for result in results} == {"fp32/whole"}
        assert [items for _, _, items in forwards.log] == [2, 3, 3]


# -- shapes, metrics ------------------------------------------------------------------------------------------------


async def test_shapes_are_checked_before_anything_is_admitted():
    async with running(TOY) as engine:
        with pytest.raises(InvalidImage, match="17x16 is not a multiple of 2"):
            await submit(engine, Task("encode", TOY), picture(16)[:, :1].repeat(17, axis=1))
        with pytest.raises(InvalidLatent, match=f"toy .{FAMILY.name}. takes scaled latents of 4 channels"):
            await submit(engine, Task("decode", TOY), latent()[:3])
        assert engine.workers[0].batcher.items == 0


GAUGES = {
    "queue_depth", "queue_pixels", "queue_oldest_age_seconds", "queue_seconds", "requests_in_flight", "draining",
    "models", "model_resident", "model_resident_bytes", "model_in_use", "device_memory_bytes",
    "worker_last_progress_timestamp_seconds", "worker_up",
}  # fmt: skip
COUNTERS = {
    "rejected", "cancelled", "batch_executions", "batch_items", "batch_item_failures", "batch_retries",
    "mode_executions", "mode_fallbacks", "oom", "nonfinite", "model_loads", "model_load_duration_seconds",
    "model_evictions", "batch_size", "pixels", "requests", "request_duration_seconds", "stage_duration_seconds",
}  # fmt: skip


async def test_the_work_that_waits_is_told_in_seconds(forwards):
    async with running(HOT) as engine:
        await submit(engine, Task("decode", HOT), latent())  # how long one takes is known from here on
        with forwards.held():
            answers = asyncio.ensure_future(submit_all(engine, Task("decode", HOT), [latent()] * 9))
            await until(lambda: engine.open_requests == 9)
            assert value(engine, "vae_queue_seconds", device="cpu") > 0
        await answers


async def test_the_metrics_exist_and_add_up(forwards):
    async with running(HOT, COLD) as engine:
        for model in (HOT, COLD):
            await submit(engine, Task("decode", model), *(latent(seed=seed) for seed in range(5)))
            await submit(engine, Task("encode", model), *(picture(seed=seed) for seed in range(3)))
        families = {family.name.removeprefix("vae_"): family for family in engine.metrics.registry.collect()}
        assert set(families) >= GAUGES | COUNTERS
        samples = [sample for family in families.values() for sample in family.samples]

        def total(name):
            return sum(sample.value for sample in samples if sample.name == f"vae_{name}")

        assert total("batch_items_total") == total("batch_size_sum") == 16
        executions = [total(name) for name in ("batch_executions_total", "batch_size_count", "mode_executions_total")]
        assert executions == [len(forwards.log)] * 3
        assert total("model_loads_total") == total("model_load_duration_seconds_count") == 2
        assert total("model_resident") == 2
        assert total("pixels_total") == 2 * (5 + 3) * 16 * 16
        assert {sample.labels.get("device") for sample in samples if sample.name == "vae_pixels_total"} == {"cpu"}
        assert total("model_resident_bytes") == 2 * HOT.weight_bytes(torch.float32)
        idle = ("queue_depth", "queue_pixels", "queue_seconds", "requests_in_flight", "model_in_use")
        assert [total(name) for name in idle] == [0] * 5
        assert all(sample.value >= 0 for sample in samples)
        models = {sample.labels["model"] for sample in samples if "model" in sample.labels}
        assert models == {"hot", "cold"}
