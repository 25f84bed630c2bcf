"""What only a CUDA device can show. Nothing here ran where it was written: there was none."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engine import compute
from app.engine.forecast import Forecaster, network_shape
from app.engine.jobs import Task
from app.engine.memory import CudaMemory
from app.engine.planning import FORWARD_PIXELS, ExecutionPlan
from app.errors import OutOfMemory
from app.terms import Op
from app.vae.autoencoder_kl import KLConfig
from tests.fakes import Forwards, checkpoint, latent, load, picture, running, submit, value

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SD = KLConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 4)
TOY, LOUD = checkpoint("toy"), checkpoint("loud")
CUDA = ("cuda:0",)


@pytest.fixture(autouse=True)
def _whole_card() -> Iterator[None]:
    """Every test begins and ends with an allocator that may take all."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def sd(name="sd"):
    """SD's architecture with its own spatial factor."""
    return replace(checkpoint(name, SD), family=replace(checkpoint().family, spatial_factor=8))


async def test_half_precision_is_the_choice_and_near_float32():
    model = sd()
    async with running(model, devices=CUDA) as engine:
        cases: list[tuple[Op, np.ndarray]] = [("decode", latent(32)), ("encode", picture(256))]
        for op, array in cases:
            (half,) = await submit(engine, Task(op, model), array)
            (full,) = await submit(engine, Task(op, model, precision="fp32"), array)
            assert (half.plan, half.reason) == ("fp16/whole", None)
            assert (full.plan, full.reason) == ("fp32/whole", "requested")
            a, b = half.array.astype(float), full.array.astype(float)
            assert np.sqrt(np.mean((a - b) ** 2)) <= 0.02 * b.std()


@pytest.mark.parametrize("op", ["decode", "encode"])
async def test_bands_equal_the_whole_in_half_precision(op):
    """Not by more than half precision itself moves the result."""
    model = sd()
    array = latent(64) if op == "decode" else picture(512)
    module = load(model, torch.float16, torch.device("cuda"))
    wide = load(model, torch.float32, torch.device("cuda"))
    item, task = torch.tensor(array, device="cuda"), Task(op, model, output="uint16")

    def run(network, plan):
        return compute.forward(network, [item], [task], plan, lambda: None).arrays[0].astype(float)

    exact = run(wide, ExecutionPlan("fp32", "whole", 1))
    whole = run(module, ExecutionPlan("fp16", "whole", 1))
    for execution in ("strips", "recompute"):
        banded = run(module, ExecutionPlan("fp16", execution, 1))
        assert np.sqrt(np.mean((banded - exact) ** 2)) <= 1.1 * np.sqrt(np.mean((whole - exact) ** 2))


@pytest.mark.parametrize("execution", ["whole", "strips", "recompute"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("op", ["decode", "encode"])
@pytest.mark.parametrize("side", [256, 512, 1024, 2048])
def test_the_forecast_covers_the_measured_peak(op, dtype, execution, side):
    if execution == "whole" and torch.cuda.get_device_properties(0).total_memory < side**2 * 4500:
        pytest.skip("the card is too small for the whole run")
    model, plan = sd(), ExecutionPlan(dtype, execution, 1)
    memory = CudaMemory(torch.device("cuda"), None)
    torch_dtype = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    module = load(model, torch_dtype, torch.device("cuda"))
    array = latent(side // 8) if op == "decode" else picture(side)
    item = torch.tensor(array, device="cuda")
    compute.forward(module, [item], [Task(op, model)], plan, lambda: None)  # libraries' own workspaces
    torch.cuda.synchronize()
    memory.begin()
    compute.forward(module, [item], [Task(op, model)], plan, lambda: None)
    peak = memory.peak()
    forecast = Forecaster("cuda").peak(network_shape(model, op, side, side), plan)
    assert peak is not None
    assert peak <= forecast <= 1.25 * peak + (32 << 20)


async def test_a_real_out_of_memory_walks_on_and_frees_what_it_held(monkeypatch):
    """The forecast is told to believe in room that the allocator does not give."""
    model = sd()
    forwards = Forwards(monkeypatch)
    monkeypatch.setattr(CudaMemory, "free", lambda self, resident: 1 << 45)
    total = torch.cuda.get_device_properties(0).total_memory
    async with running(model, devices=CUDA) as engine:
        (expected,) = await submit(engine, Task("decode", model), latent(128))
        level = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((level + (1200 << 20)) / total)
        forwards.log.clear()
        (result,) = await submit(engine, Task("decode", model), latent(128))
        assert forwards.plans[0] == "fp16/whole"
        assert (result.plan, result.reason) in {("fp16/strips", "oom"), ("fp16/recompute", "oom")}
        assert np.abs(result.array.astype(int) - expected.array).mean() < 1
        assert value(engine, "vae_oom_total") >= 1
        torch.cuda.set_per_process_memory_fraction((level + (16 << 20)) / total)
        with pytest.raises(OutOfMemory):
            await submit(engine, Task("decode", model), latent(128))
        gc.collect()
        assert torch.cuda.memory_allocated() <= level + (1 << 20)
        assert engine.alive


async def test_a_memory_limit_changes_the_plan():
    model = sd()
    async with running(model, devices=CUDA, memory_limit_bytes=3 << 30) as engine:
        results = [(await submit(engine, Task("decode", model), latent(side)))[0] for side in (64, 256)]
        assert results[0].plan == "fp16/whole"
        assert results[1].plan in {"fp16/strips", "fp16/recompute"}
        assert results[1].reason == "low_memory"


async def test_an_overflow_falls_back_to_float32_and_is_remembered():
    async with running(TOY, LOUD, devices=CUDA) as engine:
        results = await submit(engine, Task("decode", LOUD), latent(), latent(seed=1))
        assert {(result.plan, result.reason) for result in results} == {("fp32/whole", "non_finite")}
        assert engine.fp16(LOUD) == "overflows"
        (sound,) = await submit(engine, Task("decode", TOY), latent())
        assert (sound.plan, sound.reason) == ("fp16/whole", None)


async def test_no_forward_is_larger_than_the_kernels_can_index(monkeypatch):
    forwards = Forwards(monkeypatch)
    side = 1024
    many = FORWARD_PIXELS // side**2 + 2
    async with running(TOY, devices=CUDA) as engine:
        results = await submit(engine, Task("decode", TOY), *(latent(side // 2, seed) for seed in range(many)))
        assert {result.plan for result in results} == {"fp16/whole"}
        assert max(items for _, _, items in forwards.log) * side**2 <= FORWARD_PIXELS
        alone = [(await submit(engine, Task("decode", TOY), latent(side // 2, seed)))[0] for seed in (0, many - 1)]
        for result, expected in zip((results[0], results[-1]), alone, strict=True):
            assert np.abs(result.array.astype(int) - expected.array).mean() < 1


async def test_an_evicted_model_frees_its_memory_before_the_next_is_loaded():
    one, two = sd("one"), sd("two")
    async with running(one, two, devices=CUDA, cache_bytes=one.weight_bytes(torch.float16)) as engine:
        await submit(engine, Task("decode", one), latent(8))
        cache = engine.workers[0].cache
        gone = weakref.ref(cache.residents()[0].module)
        level = torch.cuda.memory_allocated()
        await submit(engine, Task("decode", two), latent(8))
        gc.collect()
        assert gone() is None
        assert torch.cuda.memory_allocated() <= level + (1 << 20)


async def test_deterministic_repeats_its_bits():
    model = sd()
    async with running(model, devices=CUDA) as engine:
        task = Task("decode", model, deterministic=True)
        first, second = [(await submit(engine, task, latent(64)))[0].array for _ in range(2)]
        assert np.array_equal(first, second)
