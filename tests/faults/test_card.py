"""A stand-in card below the real `CudaMemory`: caching, shared with another process, lost or hung in its driver."""

import asyncio
import threading
from functools import partial

import numpy as np
import pytest
import torch

from app.engine import compute, forecast, memory
from app.engine.gauges import gauges
from app.engine.jobs import Task
from app.engine.memory import CudaMemory
from app.errors import OutOfMemory, Unavailable
from tests.fakes import checkpoint, latent, running, submit, until, value
from tests.faults.device import Card, lost

TOY, OTHER = checkpoint("toy"), checkpoint("other")
SIDE = 128  # of latents: 14 MiB whole, 9 in bands
MIB = 1 << 20


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(memory, "CUDA_HEADROOM", MIB)
    monkeypatch.setattr(forecast, "OVERHEAD", MIB)
    card = Card(monkeypatch, 64 * MIB)
    monkeypatch.setattr("app.engine.engine.memory_of", lambda *_: CudaMemory(torch.device("cuda:0"), None))
    return card


async def decoded(engine, checkpoint=TOY):
    (result,) = await submit(engine, Task("decode", checkpoint), latent(SIDE))
    return result.array, result.plan, result.reason


async def test_another_process_that_takes_memory_costs_one_run_and_nothing_else(card):
    async with running(TOY) as engine:
        card.weights = lambda: engine.workers[0].cache.nbytes
        expected, *first = await decoded(engine)
        assert first == ["fp32/whole", None]
        assert card.reserved > card.weights() + 10 * MIB  # kept
        card.take(12 * MIB)  # is left: after the last look at the card
        found = [await decoded(engine) for _ in range(2)]
        assert [reason for _, _, reason in found] == ["oom", "low_memory"], found
        assert all(plan in ("fp32/strips", "fp32/recompute") for _, plan, _ in found)
        card.others = 0
        found += [await decoded(engine) for _ in range(2)]
        assert [each[1:] for each in found[2:]] == [(found[1][1], "low_memory"), ("fp32/whole", None)]
        assert all(np.abs(array.astype(int) - expected).max() <= 1 for array, _, _ in found)
        assert value(engine, "vae_oom_total") == 1
        assert value(engine, "vae_batch_item_failures_total") == 0


async def test_a_card_that_others_have_filled_refuses_until_they_go(card):
    async with running(TOY) as engine:
        card.weights = lambda: engine.workers[0].cache.nbytes
        expected, *_ = await decoded(engine)
        card.take(0)
        for _ in range(3):  # the first by experience, the others by forecast
            with pytest.raises(OutOfMemory, match="bytes"):
                await decoded(engine)
        assert value(engine, "vae_rejected_total", reason="vram") == 3
        assert engine.alive
        card.others = 0
        again, plan, reason = await decoded(engine)
        assert (plan, reason) == ("fp32/whole", None)
        assert np.array_equal(again, expected)


async def test_weights_have_room_again_once_others_go(card):
    async with running(TOY, OTHER) as engine:
        card.weights = lambda: engine.workers[0].cache.nbytes
        expected, *_ = await decoded(engine)
        for ask in (partial(decoded, engine, OTHER), partial(engine.load, OTHER, "auto")):
            card.take(0)
            with pytest.raises(OutOfMemory, match="pixels"):  # after which it was looked at
                await decoded(engine)
            with pytest.raises(OutOfMemory, match="weights of other"):
                await ask()
            card.others = 0
            await ask()
            assert engine.unload(OTHER) > 0
        assert np.array_equal((await decoded(engine))[0], expected)


@pytest.mark.parametrize("call", ["begin", "peak", "look"])
async def test_a_card_that_is_lost_says_so_in_whatever_call_finds_it(card, monkeypatch, call):
    async with running(TOY) as engine:
        await decoded(engine)
        monkeypatch.setattr(CudaMemory, call, lambda self: lost())
        monkeypatch.setattr(compute, "probe", lambda device: lost())
        answers = await asyncio.gather(*(decoded(engine) for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in answers] == [Unavailable] * 3
        assert not engine.alive
        assert engine.lost is not None


async def test_a_driver_that_hangs_takes_neither_health_nor_metrics_with_it(card):
    go, hangs = threading.Event(), threading.Event()

    def hang():
        if threading.current_thread().name.startswith("cpu-compute"):
            hangs.set()
            assert go.wait(60)
        else:
            raise AssertionError("the event loop asked the driver")

    async with running(TOY) as engine:
        expected, *_ = await decoded(engine)
        card.broken = hang
        try:
            waiting = asyncio.ensure_future(decoded(engine))
            await until(hangs.is_set)
            assert engine.alive
            assert {name for name, *_ in gauges(engine)} >= {"device_memory_bytes", "worker_up"}
            assert (await engine.plan(Task("decode", TOY), latent(SIDE).shape)).plan == "fp32/whole"
            engine.workers[0].thread.progress -= engine.workers[0]._patience + 1
            assert not engine.alive
        finally:
            go.set()
            card.broken = lambda: None
        assert np.array_equal((await waiting)[0], expected)
