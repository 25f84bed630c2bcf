from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engine import compute, forecast
from app.engine.forecast import MARGIN, OVERHEAD, CountingMode, Forecaster, NetworkShape, count, network_shape
from app.engine.jobs import Task
from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.execution import banded as strips
from app.execution import preparing
from app.store.checkpoint import blank
from app.vae.autoencoder_kl import KLConfig
from app.vae.kernels import add_kernels
from tests.fakes import FAMILY, checkpoint, latent, load, picture
from tests.store.weights import config_of

CPU = torch.device("cpu")
SD = KLConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 4)
MEDIUM = replace(
    checkpoint("medium", KLConfig((64, 64), (64, 64), 1, 1, 4, norm_groups=8)),
    family=replace(FAMILY, spatial_factor=2),
)


def test_counts_what_is_alive_and_remembers_the_peak():
    with CountingMode() as mode:
        a = torch.ones(1000)
        b = a + 1
        view = b[:10]
        del a
        c = torch.ones(500)
        del b
        assert (mode.alive, mode.peak) == (4000 + 2000, 4000 + 4000)
        del view, c
        assert mode.alive == 0


def test_what_was_there_before_does_not_count():
    weight = torch.ones(100)
    with CountingMode([weight]) as mode:
        out = weight.add_(1)
        assert mode.alive == 0
    del out


@pytest.mark.parametrize("inference", [False, True])
def test_a_convolution_s_kernel_has_a_copy_of_the_weights(inference):
    x, weight = torch.ones(1, 8, 4, 4), torch.ones(8, 8, 3, 3)
    with torch.inference_mode(inference), CountingMode([x, weight]) as mode:
        out = torch.nn.functional.conv2d(x, weight, padding=1)
    assert mode.peak == out.nbytes + weight.nbytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("execution", ["whole", "strips", "recompute"])
@pytest.mark.parametrize(("op", "form"), [("encode", "uint8"), ("encode", "float32"), ("decode", "uint8")])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_count_covers_the_real_tensors_and_little_more(monkeypatch, kernels, op, form, execution, dtype):
    """Without margin and overhead: every tensor of a real run on this CPU, from array to array."""
    side = 128
    monkeypatch.setattr(strips, "CPU_BAND", 1 << 15)
    plan = ExecutionPlan(dtype, execution, 1)
    module = load(MEDIUM, TORCH_DTYPES[dtype], CPU)
    monkeypatch.setattr(preparing, "CHANNELS", 64)
    if kernels and dtype == "fp32":
        assert add_kernels(module)
    array = (picture(side) / 256).astype(form) if op == "encode" else latent(side // 2)
    item = torch.tensor(array)
    with CountingMode([item, *module.parameters(), *module.buffers()]) as mode:
        compute.forward(module, [item], [Task(op, MEDIUM)], plan, lambda: None)
    shape = replace(network_shape(MEDIUM, op, side, side, np.dtype(form).itemsize), kernels=kernels)
    counted = count(shape, plan, CPU)
    assert 1.0 <= counted * MARGIN / mode.peak <= 1.25


@pytest.mark.parametrize(("op", "least", "most"), [("decode", 3072, 3085), ("encode", 2560, 2590)])
def test_a_whole_sd_run_takes_its_known_bytes_a_pixel(op, least, most):
    """Three maps of 256 channels at full size: the residual's input, its norm, its activation."""
    side = 512
    shape = NetworkShape(SD, op, 3, side, side) if op == "encode" else NetworkShape(SD, op, 4, side // 8, side // 8)
    assert least <= count(shape, ExecutionPlan("fp32", "whole", 1), CPU) / side**2 <= most
    half = count(shape, ExecutionPlan("fp16", "whole", 1), CPU) / side**2
    assert least / 2 <= half <= most / 2 + 20
    assert count(shape, ExecutionPlan("fp32", "whole", 2), CPU) >= 2 * least * side**2


def test_the_executions_are_in_order_of_their_memory():
    shape = NetworkShape(SD, "decode", 4, 128, 128)
    whole, strip, least = (
        count(shape, ExecutionPlan("fp32", name, 1), CPU) for name in ("whole", "strips", "recompute")
    )
    assert least < strip / 2 < whole / 4


WHOLE = ExecutionPlan("fp16", "whole", 1)
LARGE, SMALL = NetworkShape(SD, "decode", 4, 128, 128), NetworkShape(SD, "decode", 4, 8, 8)


def test_a_larger_peak_is_believed_at_once_and_a_smaller_one_slowly():
    forecaster = Forecaster("cpu")
    first = forecaster.peak(LARGE, WHOLE)
    assert first == int(count(LARGE, WHOLE, CPU) * MARGIN) + OVERHEAD
    forecaster.measured(LARGE, WHOLE, int(1.3 * (first - OVERHEAD)) + OVERHEAD)
    raised = forecaster.peak(LARGE, WHOLE)
    assert (raised - OVERHEAD) / (first - OVERHEAD) == pytest.approx(1.3)
    other = NetworkShape(SD, "decode", 4, 96, 96)
    before = Forecaster("cpu").peak(other, WHOLE)
    assert (forecaster.peak(other, WHOLE) - OVERHEAD) / (before - OVERHEAD) == pytest.approx(1.3)
    forecaster.measured(LARGE, WHOLE, first)
    assert first < forecaster.peak(LARGE, WHOLE) < raised
    for peak in (1, 1 << 50):
        for _ in range(100):
            forecaster.measured(LARGE, WHOLE, peak)
        factor = (forecaster.peak(LARGE, WHOLE) - OVERHEAD) / (first - OVERHEAD)
        assert factor == pytest.approx(0.8 if peak == 1 else 2.0, rel=0.01)


def test_small_pictures_and_other_plans_say_nothing_of_large_ones():
    forecaster = Forecaster("cpu")
    first = forecaster.peak(LARGE, WHOLE)
    forecaster.measured(SMALL, WHOLE, 1 << 40)
    forecaster.measured(LARGE, ExecutionPlan("fp32", "whole", 1), 1 << 40)
    forecaster.measured(LARGE, ExecutionPlan("fp16", "recompute", 1, budget=1), 1 << 40)
    assert forecaster.peak(LARGE, WHOLE) == first


def test_a_budget_is_what_leads_to_the_peak():
    forecaster = Forecaster("cpu")
    plan = ExecutionPlan("fp32", "recompute", 1)
    least = forecaster.peak(LARGE, plan)
    counted = strips.forecast_bytes(strips.RECOMPUTE, blank(SD).decode, (1, 4, 128, 128), torch.float32, CPU)
    assert forecaster.budget(LARGE, plan, least + 2) == pytest.approx(counted, abs=4)


def shape_of(config, op, width, height):
    factor = config.spatial_factor
    if op == "encode":
        return NetworkShape(config, op, config.pixel_channels, height, width)
    return NetworkShape(config, op, config.latent_channels, height // factor, width // factor)


@pytest.mark.parametrize("op", ["encode", "decode"])
@pytest.mark.parametrize("family", ["sd1", "taesd", "sana", "hunyuanimage"])
def test_between_what_was_counted_a_forecast_is_the_count_or_little_more(family, op):
    config, forecaster = config_of(family), Forecaster("cpu")
    for width, height, batch in ((96, 64, 1), (128, 128, 3), (512, 512, 1), (1024, 320, 2), (2048, 1536, 1)):
        shape, plan = shape_of(config, op, width, height), ExecutionPlan("fp32", "whole", batch)
        counted = count(shape, plan, CPU)
        peak = (forecaster.peak(shape, plan) - OVERHEAD) / MARGIN
        assert 0.995 <= peak / counted <= 1.02 or 0 <= peak - counted < 1 << 20


def test_shapes_of_whole_runs_need_no_more_counts_than_there_are_sides(monkeypatch):
    counted = []

    def count(*args):
        counted.append(args)
        return 1 << 30

    monkeypatch.setattr(forecast, "count", count)
    forecaster = Forecaster("cpu")
    for side, batch in ((32, 1), (32, 8), (48, 1), (96, 3), (512, 1)):
        forecaster.peak(NetworkShape(SD, "decode", 4, side, side), ExecutionPlan("fp16", "whole", batch))
    assert len(counted) == len(forecast.SIDES) - 1  # none of these is smaller than the second


def test_bands_of_a_shape_are_counted_once(monkeypatch):
    counted = []

    def count(*args):
        counted.append(args)
        return 1000

    monkeypatch.setattr(forecast, "count", count)
    forecaster, plan = Forecaster("cpu"), ExecutionPlan("fp16", "strips", 1)
    assert forecaster.peak(LARGE, plan) == forecaster.peak(LARGE, plan)
    assert len(counted) == 1


def test_the_network_s_shape_of_a_picture():
    assert network_shape(MEDIUM, "decode", 64, 32) == NetworkShape(MEDIUM.config, "decode", 4, 32, 16)
    assert network_shape(MEDIUM, "encode", 64, 32) == NetworkShape(MEDIUM.config, "encode", 3, 64, 32)
