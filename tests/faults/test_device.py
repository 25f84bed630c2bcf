"""A device that fails at any operation of a forward: what is answered, what is counted, and the next request."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from app.engine.devices import to_device
from app.engine.jobs import Task
from app.engine.memory import FixedMemory
from app.errors import DeadlineExceeded, NonFiniteOutput, OutOfMemory, Unavailable
from tests.fakes import checkpoint, latent, load, picture, running, submit, until, value
from tests.faults.device import Device, at, full, lost, only, spoilt

TOY = checkpoint("toy")
LEVELS = 1
"""Of 255: bands add float32 numbers in another order."""


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def body(op, seed=0):
    return (latent if op == "decode" else picture)(seed=seed)


async def lone(engine, task, array):
    (result,) = await submit(engine, task, array)
    return result


def near(got, expected):
    """The same picture, or the same latent but for the last digit of half precision."""
    limit = LEVELS if got.dtype == np.uint8 else float(np.spacing(np.abs(expected).max()))
    return np.abs(got.astype(float) - expected).max() <= limit


def clean(engine):
    """Nothing is held, nothing waits."""
    (device,) = engine.workers
    held = [device.batcher.items, device.batcher.pixels, device.batcher.wait_seconds(), engine.open_requests]
    return held == [0] * 4 and not any(each.in_use for each in device.cache.residents())


@pytest.mark.parametrize("op", ["decode", "encode"])
async def test_out_of_memory_at_any_step_of_any_plan(device, op):
    """The next plan answers; where the fault is in both, the one after it; and then all is as before."""
    task = Task(op, TOY)
    async with running(TOY) as engine:
        expected = await lone(engine, task, body(op))
        banded = Task(op, TOY, tiling="always")
        for wished, plan, later in ((task, "fp32/whole", "fp32/strips"), (banded, "fp32/strips", "fp32/recompute")):
            await lone(engine, wished, body(op))
            assert device.steps > 40
            for step in device.some if plan == "fp32/whole" else device.few:
                before = value(engine, "vae_oom_total"), value(engine, "vae_batch_retries_total", reason="oom")
                with device.failing(only(plan, at(step, full))):
                    result = await lone(engine, wished, body(op))
                    assert device.plans == [plan, later], step
                assert (result.plan, result.reason) == (later, "oom")
                assert near(result.array, expected.array)
                after = value(engine, "vae_oom_total"), value(engine, "vae_batch_retries_total", reason="oom")
                assert after == (before[0] + 1, before[1] + 1)
                assert clean(engine)
        assert value(engine, "vae_batch_item_failures_total") == value(engine, "vae_rejected_total") == 0
        again = await lone(engine, task, body(op))
        assert (again.plan, again.reason) == ("fp32/whole", None)
        assert np.array_equal(again.array, expected.array)


async def test_what_a_failed_forward_leaves_is_given_back_before_the_next_one(device, monkeypatch):
    released = []
    monkeypatch.setattr(FixedMemory, "release", lambda self: released.append(list(device.plans)))
    async with running(TOY) as engine:
        with device.failing(at(20, full)), pytest.raises(OutOfMemory):
            await submit(engine, Task("decode", TOY), latent())
        assert released == [["fp32/whole", "fp32/strips", "fp32/recompute"][:count] for count in (1, 2, 3)]


async def test_out_of_memory_in_every_plan_is_said_and_the_next_one_is_answered(device):
    async with running(TOY) as engine:
        expected = await lone(engine, Task("decode", TOY), latent())
        for step in device.few:
            with device.failing(at(step, full)), pytest.raises(OutOfMemory):
                await submit(engine, Task("decode", TOY), latent())
            assert device.plans == ["fp32/whole", "fp32/strips", "fp32/recompute"]
            assert clean(engine)
            again = await lone(engine, Task("decode", TOY), latent())
            assert np.array_equal(again.array, expected.array)
        assert value(engine, "vae_rejected_total", reason="vram") == value(engine, "vae_batch_item_failures_total")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", ["decode", "encode"])
async def test_what_is_not_finite_in_half_precision_at_any_step_runs_again_in_full(device, op, number):
    task = Task(op, TOY)
    async with running(TOY, precision="fp16") as engine:
        half = await lone(engine, task, body(op))
        full_ = await lone(engine, Task(op, TOY, precision="fp32"), body(op))
        await lone(engine, task, body(op))
        found = [step for step in device.some if await _spoils(engine, device, task, step, number, full_, half)]
        assert len(found) >= len(device.some) // 2
        count = value(engine, "vae_mode_fallbacks_total", **{"from": "fp16", "to": "fp32", "reason": "nonfinite"})
        assert count == value(engine, "vae_nonfinite_total") == len(found)
        assert value(engine, "vae_batch_item_failures_total") == 0
        assert clean(engine)


async def _spoils(engine, device, task, step, number, full_, half):
    """Whether half precision came out wrong; the answer is right in any case, and so is the next one."""
    with device.failing(only("fp16", spoilt(step, number))):
        result = await lone(engine, task, body(task.op))
    wrong = device.plans == ["fp16/whole", "fp32/whole"]
    assert (result.plan, result.reason) == (("fp32/whole", "non_finite") if wrong else ("fp16/whole", None))
    engine.forget_overflow(TOY)  # the network is sound: it was the device
    again = await lone(engine, task, body(task.op))
    assert (again.plan, again.reason) == ("fp16/whole", None)
    assert np.array_equal(again.array, half.array)
    assert not wrong or np.array_equal(result.array, full_.array)
    assert wrong or near(result.array, half.array), step
    return wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tiling", ["never", "always"])
async def test_what_is_not_finite_in_the_last_precision_is_an_error_and_no_verdict(device, precision, tiling):
    task = Task("decode", TOY, precision=precision, tiling=tiling)
    async with running(TOY) as engine:
        expected = await lone(engine, task, latent())
        steps = device.steps
        for step in (steps // 4, steps // 3, steps // 2):
            with device.failing(spoilt(step, float("nan"))), pytest.raises(NonFiniteOutput, match=precision):
                await submit(engine, task, latent())
            assert len(device.plans) == 1
            assert clean(engine)
            assert np.array_equal((await lone(engine, task, latent())).array, expected.array)
        assert value(engine, "vae_nonfinite_total") == value(engine, "vae_batch_item_failures_total", reason="nan") == 3
        assert engine.fp16(TOY) == "unknown"


async def test_an_error_at_any_step_that_the_device_survives_is_one_request_s_own(device):
    async with running(TOY) as engine:
        expected = await lone(engine, Task("decode", TOY), latent())
        steps = device.some
        for step in steps:
            with device.failing(at(step, lost)), pytest.raises(torch.AcceleratorError):
                await submit(engine, Task("decode", TOY), latent())
            assert len(device.plans) == 1
            assert clean(engine)
            assert np.array_equal((await lone(engine, Task("decode", TOY), latent())).array, expected.array)
        assert value(engine, "vae_batch_item_failures_total", reason="error") == len(steps)
        assert (engine.alive, engine.ready) == (True, True)


async def test_an_error_that_comes_behind_its_host_lets_nothing_out_that_was_computed_meanwhile(device):
    async with running(TOY) as engine:
        expected = await lone(engine, Task("decode", TOY), latent())
        for error, plans in ((lost, ["fp32/whole"]), (full, ["fp32/whole", "fp32/strips", "fp32/recompute"])):
            device.at_end = error
            with device.failing(spoilt(5, 0.0)), pytest.raises((torch.AcceleratorError, OutOfMemory)):
                await submit(engine, Task("decode", TOY), latent())
            device.at_end = lambda: None
            assert device.plans == plans
            assert np.array_equal((await lone(engine, Task("decode", TOY), latent())).array, expected.array)
        assert clean(engine)


@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
async def test_a_context_that_is_lost_at_any_step_ends_all_that_waits_and_runs_nothing_more(device, where):
    async with running(TOY) as engine:
        await lone(engine, Task("decode", TOY), latent())
        step = int(where * device.steps)
        device.lose()
        with device.failing(at(step, lost)):
            waiting = [submit(engine, Task("decode", TOY, deterministic=True), latent(seed=seed)) for seed in range(5)]
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in answers] == [Unavailable] * 5
        assert len(device.plans) == 1
        assert (engine.alive, engine.ready, clean(engine)) == (False, False, True)
        assert value(engine, "vae_batch_item_failures_total", reason="lost") >= 1
        assert value(engine, "vae_worker_up", device="cpu") == 0


async def test_a_context_that_is_lost_while_weights_are_loaded(device, monkeypatch):
    def fails(*_):
        lost()

    async with running(TOY, load=fails) as engine:
        device.lose()
        with pytest.raises(Unavailable):
            await submit(engine, Task("decode", TOY), latent())
        assert engine.lost is not None
        assert value(engine, "vae_model_loads_total", result="error") == 1


# -- what hangs, and what is slow ----------------------------------------------------------------------------------


async def test_a_device_that_hangs_at_any_step_answers_at_the_deadline_and_turns_red(device):
    async with running(TOY) as engine:
        expected = await lone(engine, Task("decode", TOY), latent())
        for step in (0, device.steps - 1):
            go, hangs = threading.Event(), threading.Event()

            def hang(go=go, hangs=hangs):
                hangs.set()
                assert go.wait(60)

            try:
                with device.failing(at(step, hang)):
                    began = time.monotonic()
                    arrays = [latent(seed=seed) for seed in range(3)]
                    with pytest.raises(DeadlineExceeded):
                        await submit(engine, Task("decode", TOY), *arrays, deadline=began + 3.0)
                    assert hangs.is_set()
                    assert time.monotonic() - began < 30
                    assert engine.alive
                    engine.workers[0].thread.progress -= engine.workers[0]._patience + 1
                    assert not engine.alive
                    assert value(engine, "vae_worker_up", device="cpu") == 0
            finally:
                go.set()
            await until(lambda: not engine.workers[0].busy)
            assert (await lone(engine, Task("decode", TOY), latent())).array.tolist() == expected.array.tolist()
            assert engine.alive
            await until(lambda: clean(engine))
        assert value(engine, "vae_rejected_total", reason="deadline") == 6
        assert value(engine, "vae_cancelled_total") == 0


async def test_a_load_that_hangs_holds_nobody_beyond_the_deadline():
    go = threading.Event()

    def slow(*given):
        assert go.wait(60)
        return load(*given)

    async with running(TOY, load=slow) as engine:
        try:
            with pytest.raises(DeadlineExceeded):
                await submit(engine, Task("decode", TOY), latent(), deadline=time.monotonic() + 0.1)
            assert value(engine, "vae_rejected_total", reason="deadline") == 1
        finally:
            go.set()
        assert (await lone(engine, Task("decode", TOY), latent())).plan == "fp32/whole"
        await until(lambda: clean(engine))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("cannot pin memory")])
async def test_slow_and_failing_transfers_are_their_own_requests(monkeypatch, error):
    real, calls = to_device, []

    def slow(*given):
        calls.append(1)
        time.sleep(0.02)
        if len(calls) % 3 == 0:
            raise error
        return real(*given)

    async with running(TOY) as engine:
        expected = [await lone(engine, Task("decode", TOY), latent(seed=seed)) for seed in range(9)]
        monkeypatch.setattr("app.engine.worker.to_device", slow)
        work = [submit(engine, Task("decode", TOY, deterministic=True), latent(seed=seed)) for seed in range(9)]
        answers = await asyncio.gather(*work, return_exceptions=True)
        good = [(each, alone) for each, alone in zip(answers, expected, strict=True) if isinstance(each, list)]
        assert len(good) == 6
        assert all(near(each[0].array, alone.array) for each, alone in good)
        assert clean(engine)
        assert engine.alive
