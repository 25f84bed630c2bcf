from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from prometheus_client import CollectorRegistry

from app.engine import forecast
from app.engine.cache import ModelCache
from app.engine.forecast import Forecaster
from app.engine.jobs import Task
from app.engine.memory import FixedMemory
from app.engine.planner import Choice, Planner, shape_of
from app.engine.planning import ExecutionPlan
from app.engine.verdicts import Verdicts
from app.errors import InvalidParameter, OutOfMemory
from app.metrics import DeviceMetrics, Metrics
from app.terms import Op
from app.vae.architectures import ARCHITECTURES
from app.vae.latent_format import LatentFormat
from tests.fakes import FAMILY, checkpoint, load

TOY = checkpoint("toy")
TASK = Task("decode", TOY)
SHAPE = (4, 32, 32)
PEAKS = {("whole", 4): 400, ("whole", 2): 200, ("whole", 1): 100, ("strips", 1): 40, ("recompute", 1): 15}


class Told(Forecaster):
    """A forecaster that was told."""

    def peak(self, shape, plan):
        return PEAKS[plan.execution, plan.batch]

    def budget(self, shape, plan, available):
        return available - 1


async def never(checkpoint, dtype):
    raise AssertionError("nothing is loaded here")


def planner(precision="auto", device="cpu", room=1000):
    memory = FixedMemory(room)
    cache = ModelCache(never, memory, None, DeviceMetrics(Metrics(CollectorRegistry()), "cpu"), "cpu")
    return Planner(device, memory, cache, Told("cpu"), Verdicts(), precision)


def test_a_verdict_moves_everybody_s_start():
    plans = planner("fp16")
    assert (plans.order(TASK), plans.demoted(TASK, plans.order(TASK))) == (("fp16", "fp32"), False)
    plans.verdicts.overflowed(TOY)
    assert (plans.order(TASK), plans.demoted(TASK, plans.order(TASK))) == (("fp32",), True)
    assert plans.order(Task("decode", TOY, precision="fp16")) == ("fp16",)
    assert plans.verdicts.of(TOY) == "overflows"
    assert plans.verdicts.of(checkpoint("other")) == "unknown"
    assert plans.verdicts.of(replace(checkpoint("known"), fp16="ok")) == "ok"


@pytest.mark.parametrize(
    ("precision", "tiling", "plan", "unusual"),
    [
        ("auto", "auto", ("fp32", "whole"), False),
        ("fp32", "never", ("fp32", "whole"), False),
        ("bf16", "auto", ("bf16", "whole"), True),
        ("auto", "always", ("fp32", "strips"), True),
        ("auto", "auto", ("fp32", "strips"), False),  # memory's doing, not the request's
    ],
)
def test_a_wish_is_unusual_where_it_changes_the_plan(precision, tiling, plan, unusual):
    task = Task("decode", TOY, precision=precision, tiling=tiling)
    assert planner().unusual(task, ExecutionPlan(plan[0], plan[1], 1)) is unusual


def test_a_deterministic_plan_does_not_depend_on_the_moment():
    plans = planner(room=100_000)
    plans.cache._promised = 90_000
    assert plans.available(TASK) == 10_000
    alone = plans.available(Task("decode", TOY, deterministic=True))
    assert alone == 100_000 - TOY.weight_bytes(torch.float32)


async def test_the_prospect_of_a_task_counts_its_own_weights_as_there():
    weights = TOY.weight_bytes(torch.float32)
    memory = FixedMemory(10 * weights)

    async def loaded(checkpoint, dtype):
        return load(checkpoint, torch.float32, torch.device("cpu"))

    cache = ModelCache(loaded, memory, None, DeviceMetrics(Metrics(CollectorRegistry()), "cpu"), "cpu")
    plans = Planner("cpu", memory, cache, Told("cpu"), Verdicts(), "auto")
    assert plans.prospect(TASK) == 9 * weights
    resident = await cache.acquire(TOY, "fp32")
    assert plans.prospect(TASK) == 9 * weights
    cache.release(resident)
    assert plans.prospect(TASK) == 9 * weights
    cache.pin(TOY.sha256)
    assert plans.prospect(TASK) == 9 * weights
    assert plans.prospect(Task("decode", checkpoint("other"))) == 8 * weights


@pytest.mark.parametrize(
    ("items", "available", "execution", "batch", "peak", "budget"),
    [
        (4, 400, "whole", 4, 400, None),
        (4, 399, "whole", 2, 200, None),
        (4, 99, "strips", 1, 40, None),
        (4, 39, "recompute", 1, 39, 38),  # all there is, to be as fast as that allows
        (1, 15, "recompute", 1, 15, 14),
    ],
)
def test_choose(items, available, execution, batch, peak, budget):
    chosen = planner().choose(TASK, SHAPE, items, "fp32", available)
    assert chosen == Choice(ExecutionPlan("fp32", execution, batch, budget), peak, first=available == 400)


def test_after_a_failure_recompute_takes_as_little_as_it_can():
    failed = ExecutionPlan("fp32", "recompute", 1, 38)
    assert planner().choose(TASK, SHAPE, 1, "fp32", 39, failed) == Choice(replace(failed, budget=None), 15)
    with pytest.raises(OutOfMemory, match="ran out of memory in fp32/recompute, the last plan there was"):
        planner().choose(TASK, SHAPE, 1, "fp32", 39, replace(failed, budget=None))


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        ("auto", "4096 pixels need 15 bytes in the smallest plan, fp32/recompute; 14 bytes are available$"),
        ("never", "need 100 bytes in the smallest plan, fp32/whole; 14 .*; tiling=never forbids smaller plans$"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(tiling, words):
    with pytest.raises(OutOfMemory, match=words):
        planner().choose(Task("decode", TOY, tiling=tiling), SHAPE, 4, "fp32", 14)


def test_too_many_pixels_for_one_forward_on_a_card():
    with pytest.raises(OutOfMemory, match="too many for one whole forward on cuda; tiling=never forbids"):
        planner(device="cuda").choose(Task("decode", TOY, tiling="never"), (4, 2048, 2048), 1, "fp16", 1 << 40)


def test_a_network_without_bands_is_planned_whole(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "kl", replace(ARCHITECTURES["kl"], executions=("whole",)))
    assert list(planner().answer("cpu", TASK, SHAPE, 200, 200).plans) == ["fp32/whole"]
    with pytest.raises(OutOfMemory, match="100 bytes in the smallest plan, fp32/whole"):
        planner().choose(TASK, SHAPE, 4, "fp32", 99)
    with pytest.raises(InvalidParameter, match=r"tiling=always: .* runs whole only"):
        planner().choose(Task("decode", TOY, tiling="always"), SHAPE, 1, "fp32", 1000)


def test_what_was_counted_ahead_is_all_that_a_whole_run_asks_for(monkeypatch):
    plans = replace(planner(room=1 << 40), forecaster=Forecaster("cpu"))
    for op, side in product(get_args(Op), forecast.SIDES):
        plans.prepare(TOY, "fp32", op, side)
    monkeypatch.setattr(forecast, "count", None)
    for task, shape in ((TASK, SHAPE), (TASK, (4, 24, 200)), (Task("encode", TOY, seed=1), (640, 34, 3))):
        for items in (1, 7):
            choice = plans.choose(task, shape, items, "fp32", 1 << 40)
            assert choice.plan == ExecutionPlan("fp32", "whole", items)


def test_the_answer_shows_all_plans_and_the_one_chosen():
    answer = planner(room=50).answer("cpu", TASK, SHAPE, 45, 50)
    assert answer.plans == {"fp32/whole": 100, "fp32/strips": 40, "fp32/recompute": 15}
    assert (answer.plan, answer.forecast_bytes, answer.free_bytes, answer.available_bytes) == (
        "fp32/strips",
        40,
        45,
        50,
    )
    assert planner().answer("cpu", TASK, SHAPE, 0, 0).plan is None


def test_the_network_s_shape_of_an_array():
    packed = replace(TOY, family=replace(FAMILY, latent_format=LatentFormat(patch=2)))
    assert shape_of(Task("encode", TOY), (30, 20, 3)) == forecast.NetworkShape(TOY.config, "encode", 3, 30, 20)
    assert shape_of(Task("encode", TOY), (30, 20, 3), 4) == forecast.NetworkShape(TOY.config, "encode", 3, 30, 20, 4)
    wide = Task("decode", TOY, output="float32")  # its latents, two bytes each, are not what is meant
    assert shape_of(wide, (4, 15, 10), 2) == forecast.NetworkShape(TOY.config, "decode", 4, 15, 10, 4)
    assert shape_of(TASK, (4, 15, 10)) == forecast.NetworkShape(TOY.config, "decode", 4, 15, 10)
    assert shape_of(Task("decode", packed), (16, 15, 10)) == forecast.NetworkShape(TOY.config, "decode", 4, 30, 20)
    assert shape_of(Task("decode", packed, latents="raw"), (4, 15, 10)) == forecast.NetworkShape(
        TOY.config, "decode", 4, 15, 10
    )
