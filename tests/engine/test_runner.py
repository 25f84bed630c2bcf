import asyncio
import weakref

import numpy as np
import pytest
import torch

from app.engine import compute
from app.engine.cache import ModelCache
from app.engine.forecast import CountingMode, Forecaster
from app.engine.jobs import Task
from app.engine.memory import FixedMemory
from app.engine.worker import STALL_SECONDS
from app.errors import DeadlineExceeded, NonFiniteOutput, OutOfMemory, Unavailable
from tests.fakes import Forwards, checkpoint, job, latent, picture, running, submit, submit_all, until, value

TOY, LOUD = checkpoint("toy"), checkpoint("loud")


@pytest.fixture
def forwards(monkeypatch):
    return Forwards(monkeypatch)


def room_for(items):
    """Refuses whole forwards of more items, as an allocator does."""

    def before(inputs, plan):
        if plan.execution == "whole" and len(inputs) > items:
            raise torch.OutOfMemoryError("no room")

    return before


async def lone(engine, task, array):
    (result,) = await submit(engine, task, array)
    return result.array


async def test_a_batch_takes_its_module_once(monkeypatch):
    acquired, acquire = [], ModelCache.acquire

    async def counting(cache, *args):
        acquired.append(args)
        return await acquire(cache, *args)

    monkeypatch.setattr(ModelCache, "acquire", counting)
    async with running(TOY) as engine:
        await submit(engine, Task("decode", TOY), latent())
        assert len(acquired) == 1
        assert not any(resident.in_use for resident in engine.residencies(TOY.sha256))


# -- memory --------------------------------------------------------------------------------------------------------


async def test_out_of_memory_halves_the_batch(forwards):
    arrays = [latent(seed=seed) for seed in range(6)]
    async with running(TOY) as engine:
        expected = [await lone(engine, Task("decode", TOY), array) for array in arrays]
        forwards.log.clear()
        forwards.before = room_for(2)
        results = await submit(engine, Task("decode", TOY), *arrays)
        assert [items for _, _, items in forwards.log] == [6, 3, 1, 2, 3, 1, 2]
        for result, array in zip(results, expected, strict=True):
            assert np.abs(result.array.astype(int) - array).max() <= 1
        assert {(result.plan, result.reason) for result in results} == {("fp32/whole", "oom")}
        assert value(engine, "vae_oom_total") == value(engine, "vae_batch_retries_total", reason="oom") == 3
        assert value(engine, "vae_batch_item_failures_total", reason="oom") == 0


@pytest.mark.parametrize("tiling", ["auto", "never"])
async def test_then_it_walks_the_executions_and_ends_after_a_handful(forwards, tiling):
    def before(inputs, plan):
        raise torch.OutOfMemoryError("no room")

    forwards.before = before
    async with running(TOY) as engine:
        with pytest.raises(OutOfMemory, match=r"256 pixels ran out of memory in fp32/\w+.* \d+ bytes"):
            await submit(engine, Task("decode", TOY, tiling=tiling), latent())
        walked = ["fp32/whole", "fp32/strips", "fp32/recompute"] if tiling == "auto" else ["fp32/whole"]
        assert forwards.plans == walked
        assert value(engine, "vae_rejected_total", reason="vram") == 1
        assert value(engine, "vae_batch_item_failures_total", reason="oom") == 1
        if tiling == "auto":
            fallbacks = [
                value(engine, "vae_mode_fallbacks_total", **{"from": a, "to": b, "reason": "oom"})
                for a, b in (("whole", "strips"), ("strips", "recompute"))
            ]
            assert fallbacks == [1, 1]


async def test_the_next_execution_answers_and_says_why(forwards):
    async with running(TOY) as engine:
        whole = await lone(engine, Task("decode", TOY), latent())
        forwards.before = room_for(0)
        (result,) = await submit(engine, Task("decode", TOY), latent())
        assert (result.plan, result.reason) == ("fp32/strips", "oom")
        assert np.abs(result.array.astype(int) - whole).max() <= 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_every_allocator_that_says_so_is_out_of_memory(forwards, error):
    def before(inputs, plan):
        if plan.execution == "whole":
            raise error

    forwards.before = before
    async with running(TOY) as engine:
        (result,) = await submit(engine, Task("decode", TOY), latent())
        assert (result.plan, result.reason) == ("fp32/strips", "oom")
        assert engine.lost is None


@pytest.mark.parametrize("fallback", [True, False])
async def test_the_batch_staged_behind_gives_up_its_weights_before_a_batch_fails(forwards, fallback):
    """Room for two modules: the staged one's, and the running one's in one precision of the two that it needs."""
    loud, other = checkpoint("loud"), checkpoint("other")
    room = loud.weight_bytes(torch.float32) + other.weight_bytes(torch.float16)
    async with running(loud, other, precision="fp16", cache_bytes=room if fallback else 1 << 30) as engine:
        with forwards.held():
            first = asyncio.ensure_future(submit(engine, Task("decode", loud), latent()))
            await until(forwards.entered.is_set)
            second = asyncio.ensure_future(submit(engine, Task("decode", other), latent()))
            await until(lambda: engine.workers[0]._staged is not None)
        (result,), (behind,) = await asyncio.gather(first, second)
        assert (result.plan, behind.plan) == ("fp32/whole", "fp16/whole")
        assert engine.workers[0].cache.nbytes <= room or not fallback


async def test_pages_are_kept_where_the_gaps_have_room_and_only_by_who_may_tune_the_process(monkeypatch):
    said: list[bool] = []
    async with running(TOY, keep_pages=said.append) as engine:
        await submit(engine, Task("decode", TOY), latent())
        monkeypatch.setattr(engine.workers[0].memory, "limit", 8 << 20)  # bytes: the forecast is over half of it
        await submit(engine, Task("decode", TOY), latent())
    assert said == [True, False]


async def test_the_tensors_of_a_failed_forward_are_gone_before_the_next(forwards):
    held: list[weakref.ref[torch.Tensor]] = []

    def before(inputs, plan):
        assert all(ref() is None for ref in held)
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        if len(held) < 3:
            raise torch.OutOfMemoryError("no room")

    forwards.before = before
    async with running(TOY) as engine:
        (result,) = await submit(engine, Task("decode", TOY), latent())
    assert result.plan == "fp32/recompute"
    assert len(held) == 3


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode", "encode"])
async def test_a_checkpoint_that_overflows_in_half_precision_beside_a_sound_one(forwards, op):
    async with running(TOY, LOUD, precision="fp16") as engine:
        arrays = [(latent if op == "decode" else picture)(seed=seed) for seed in range(3)]
        loud, sound = await asyncio.gather(
            submit(engine, Task(op, LOUD), *arrays), submit(engine, Task(op, TOY), *arrays)
        )
        assert {(result.plan, result.reason) for result in loud} == {("fp32/whole", "non_finite")}
        assert {(result.plan, result.reason) for result in sound} == {("fp16/whole", None)}
        assert (engine.fp16(LOUD), engine.fp16(TOY)) == ("overflows", "unknown")
        assert value(engine, "vae_nonfinite_total") == 3
        assert value(engine, "vae_mode_fallbacks_total", **{"from": "fp16", "to": "fp32", "reason": "nonfinite"}) == 3
        forwards.log.clear()
        (again,) = await submit(engine, Task(op, LOUD), arrays[0])
        assert forwards.log == [("loud", "fp32/whole", 1)]  # half precision is not tried any more
        assert (again.plan, again.reason) == ("fp32/whole", "non_finite")


async def test_only_the_items_that_overflowed_run_again(forwards):
    arrays = [latent(seed=seed).astype(np.float32) for seed in range(4)]
    arrays[2] *= 1e6  # beyond half precision before the first layer
    task = Task("decode", TOY, latents="raw")
    async with running(TOY, precision="fp16") as engine:
        results = await submit(engine, task, *arrays)
        assert forwards.log == [("toy", "fp16/whole", 4), ("toy", "fp32/whole", 1)]
        assert [result.plan for result in results] == ["fp16/whole", "fp16/whole", "fp32/whole", "fp16/whole"]
        assert [result.reason for result in results] == [None, None, "non_finite", None]
        assert value(engine, "vae_nonfinite_total") == value(engine, "vae_batch_retries_total", reason="nan") == 1
        exact = await lone(engine, Task("decode", TOY, latents="raw", precision="fp32"), arrays[2])
        assert np.abs(results[2].array.astype(int) - exact).max() <= 1


async def test_a_latent_that_half_precision_cannot_hold_says_nothing_of_the_checkpoint(caplog):
    huge = latent().astype(np.float32)
    huge[0, 0, 0] = 7e4  # over float16's 65504 once it is unscaled, and before
    async with running(TOY, precision="fp16") as engine:
        (result,) = await submit(engine, Task("decode", TOY), huge)
        assert (result.plan, result.reason) == ("fp32/whole", "non_finite")
        assert engine.fp16(TOY) == "unknown"
        (result,) = await submit(engine, Task("decode", TOY), latent())
        assert (result.plan, result.reason) == ("fp16/whole", None)


async def test_who_showed_that_a_checkpoint_overflows_is_in_the_log(caplog):
    loud = checkpoint("loud")
    async with running(loud, precision="fp16") as engine:
        async with engine.admit(Task("decode", loud), [(4, 8, 8)], None, "request-7") as admission:
            await admission.run([latent()])
        assert engine.fp16(loud) == "overflows"
    assert "loud overflows in fp16, as request request-7 shows" in caplog.text


async def test_a_verdict_is_tried_again_after_many_good_batches(forwards, monkeypatch):
    monkeypatch.setattr("app.engine.verdicts.RETRY", 2)
    loud = checkpoint("loud")
    async with running(loud, precision="fp16") as engine:
        for _ in range(4):
            await submit(engine, Task("decode", loud), latent())
        both = ["fp16/whole", "fp32/whole"]
        assert forwards.plans == [*both, "fp32/whole", "fp32/whole", *both]
        engine.forget_overflow(loud)
        await submit(engine, Task("decode", loud), latent())
        assert forwards.plans[-2:] == both


async def test_a_peak_that_a_load_is_in_corrects_no_forecast(monkeypatch):
    """On CUDA the counter is the device's, and weights on their way would move the correction up to twice."""
    noted = []
    monkeypatch.setattr(Forecaster, "measured", lambda forecaster, shape, plan, peak: noted.append(peak))
    monkeypatch.setattr(FixedMemory, "peak", lambda memory: 123)
    async with running(TOY) as engine:
        cache = engine.workers[0].cache
        await submit(engine, Task("decode", TOY), latent())
        assert noted == [123]
        monkeypatch.setattr(ModelCache, "loading", property(lambda cache: True))
        await submit(engine, Task("decode", TOY), latent())
        monkeypatch.undo()
        monkeypatch.setattr(Forecaster, "measured", lambda forecaster, shape, plan, peak: noted.append(peak))

        def peak(memory):
            cache.loads += 1
            return 123

        monkeypatch.setattr(FixedMemory, "peak", peak)
        await submit(engine, Task("decode", TOY), latent())
    assert noted == [123]


async def test_what_no_precision_can_hold_is_an_error_and_no_verdict(forwards):
    array = np.full((4, 8, 8), np.nan, np.float32)
    async with running(TOY, precision="fp16") as engine:
        answers = await submit_all(engine, Task("decode", TOY, latents="raw"), [array, latent().astype(np.float32)])
        assert isinstance(answers[0], NonFiniteOutput)
        assert "NaN or Inf in fp16, fp32" in str(answers[0])
        assert answers[1].plan == "fp16/whole"
        assert engine.fp16(TOY) == "unknown"
        assert value(engine, "vae_batch_item_failures_total", reason="nan") == 1


@pytest.mark.parametrize(
    ("precision", "model", "outcome"),
    [
        ("fp16", TOY, ("fp16/whole", "requested")),
        ("bf16", TOY, ("bf16/whole", "requested")),
        ("fp32", TOY, ("fp32/whole", None)),  # what everybody gets on a CPU
        ("bf16", LOUD, ("bf16/whole", "requested")),
        ("fp16", LOUD, None),
    ],
)
async def test_a_request_gets_the_precision_it_names_or_an_error(precision, model, outcome):
    async with running(TOY, LOUD) as engine:
        task = Task("decode", model, precision=precision)
        if outcome is None:
            with pytest.raises(NonFiniteOutput, match=r"NaN or Inf in fp16$"):
                await submit(engine, task, latent())
            return
        (result,) = await submit(engine, task, latent())
        assert (result.plan, result.reason) == outcome


async def test_bands_for_a_request_that_asks_for_them():
    async with running(TOY) as engine:
        (result,) = await submit(engine, Task("decode", TOY, tiling="always"), latent())
        assert (result.plan, result.reason) == ("fp32/strips", "requested")


# -- one fails alone -----------------------------------------------------------------------------------------------


async def test_one_bad_item_fails_alone(forwards):
    def before(inputs, plan):
        if any(array[0, 0, 0] == 777 for array in inputs):
            raise ValueError("poison")

    forwards.before = before
    arrays = [latent(seed=seed) for seed in range(4)]
    arrays[1][0, 0, 0] = 777
    async with running(TOY) as engine:
        answers = await submit_all(engine, Task("decode", TOY), arrays)
        assert [type(answer).__name__ for answer in answers] == ["Result", "ValueError", "Result", "Result"]
        assert [items for _, _, items in forwards.log] == [4, 1, 1, 1, 1]
        assert value(engine, "vae_batch_retries_total", reason="isolate") == 1
        assert value(engine, "vae_batch_item_failures_total", reason="error") == 1


async def test_of_a_request_that_failed_nothing_more_is_run(forwards):
    def before(inputs, plan):
        raise ValueError("poison")

    async with running(TOY) as engine:
        await lone(engine, Task("decode", TOY), latent())
        forwards.before = before
        forwards.log.clear()
        with pytest.raises(ValueError, match="poison"):
            await submit(engine, Task("decode", TOY, deterministic=True), *(latent(seed=seed) for seed in range(9)))
        await until(lambda: not engine.workers[0].busy and not engine.workers[0].batcher.items)
        assert len(forwards.log) <= 2  # the next one may have begun by itself
        assert value(engine, "vae_cancelled_total") >= 7


# -- nobody waits any more -----------------------------------------------------------------------------------------


async def test_whoever_has_gone_or_is_late_is_dropped_before_compute_and_counted(forwards):
    async with running(TOY) as engine:
        batcher = engine.workers[0].batcher
        first, gone, late, waiting = (job(Task("decode", TOY, deterministic=True), latent()) for _ in range(4))
        with forwards.held():
            batcher.put(batcher.admit(4, 4 * 256, None, 0.0), [first, gone, late, waiting])
            await until(lambda: batcher.items == 2)  # one is on the device, one is staged
            gone.future.cancel()
            late.deadline = 0.0
        await waiting.future
        with pytest.raises(DeadlineExceeded):
            await late.future
        assert len(forwards.log) == 2
        assert value(engine, "vae_cancelled_total", stage="compute") == 1
        assert value(engine, "vae_rejected_total", reason="deadline") == 1
        assert (batcher.items, batcher.pixels) == (0, 0)


@pytest.mark.parametrize("tiling", ["always", "never"])
async def test_a_run_whose_client_goes_stops_at_the_next_layer_and_leaves_nothing(monkeypatch, tiling):
    real, checks, modes = compute.forward, [], []
    loop = asyncio.get_running_loop()
    only = job(Task("decode", TOY, tiling=tiling), latent(32))

    def run(module, inputs, tasks, plan, check):
        def watched():
            checks.append(1)
            if len(checks) == 3:
                asyncio.run_coroutine_threadsafe(leave(), loop).result(60)
            check()

        with CountingMode() as mode:
            modes.append(mode)
            return real(module, inputs, tasks, plan, watched)

    async def leave():
        only.future.cancel()

    monkeypatch.setattr(compute, "forward", run)
    async with running(TOY) as engine:
        worker = engine.workers[0]
        worker.batcher.put(worker.batcher.admit(1, only.pixels, None, 0.0), [only])
        await until(lambda: len(checks) >= 3 and not worker.busy)
        assert len(checks) == 3
        assert modes[0].peak > 0
        assert modes[0].alive < modes[0].peak / 100  # a few statistics, until the next garbage collection
        assert worker.cache.residents()[0].in_use == 0
        assert value(engine, "vae_cancelled_total", stage="compute") == 1


# -- the device ----------------------------------------------------------------------------------------------------


def fails(inputs, plan):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


async def test_a_lost_device_is_said_everywhere(forwards, monkeypatch):
    async with running(TOY) as engine:
        assert (engine.alive, engine.ready) == (True, True)
        forwards.before = fails
        monkeypatch.setattr(compute, "probe", lambda device: fails(None, None))
        queued = [latent(seed=seed) for seed in range(3)]
        answers = await submit_all(engine, Task("decode", TOY, deterministic=True), queued)
        assert [type(answer) for answer in answers] == [Unavailable] * 3
        assert (engine.alive, engine.ready) == (False, False)
        assert "illegal memory access" in str(engine.lost)
        with pytest.raises(Unavailable):
            await submit(engine, Task("decode", TOY), latent())
        assert len(forwards.log) == 1  # nothing more is sent to it
        assert value(engine, "vae_worker_up", device="cpu") == 0


async def test_an_error_that_the_device_survives_is_the_request_s_own(forwards):
    async with running(TOY) as engine:
        forwards.before = fails
        with pytest.raises(torch.AcceleratorError):
            await submit(engine, Task("decode", TOY), latent())
        forwards.before = lambda inputs, plan: None
        await submit(engine, Task("decode", TOY), latent())
        assert (engine.alive, engine.ready) == (True, True)


async def test_a_thread_that_does_not_come_back_turns_liveness_red_and_ready_is_as_it_was(forwards):
    async with running(TOY) as engine:
        thread = engine.workers[0].thread
        with forwards.held():
            waiting = asyncio.ensure_future(submit(engine, Task("decode", TOY), latent()))
            await until(forwards.entered.is_set)
            assert engine.alive
            thread.progress -= STALL_SECONDS + 1
            assert not engine.alive
            assert engine.ready
        await waiting
        assert engine.alive  # an idle thread is not stuck
