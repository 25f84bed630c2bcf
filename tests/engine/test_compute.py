from copy import deepcopy
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from app.engine import compute
from app.engine.jobs import Task
from app.engine.planning import ExecutionPlan
from app.errors import InvalidImage, Unavailable
from app.execution.primitive import Whole
from tests.fakes import FAMILY, checkpoint, latent, load, picture

TOY = checkpoint("toy")
WHOLE = ExecutionPlan("fp32", "whole", 2)
PLANS = [WHOLE, ExecutionPlan("fp32", "strips", 1), ExecutionPlan("fp32", "recompute", 1)]


def nothing():
    pass


@pytest.fixture(scope="module")
def module():
    return load(TOY, torch.float32, torch.device("cpu"))


SCALE = float(FAMILY.latent_format.scaling_factor)  # type: ignore[arg-type]


def run(module, arrays, tasks, plan=WHOLE, check=nothing):
    return compute.forward(module, [torch.tensor(array) for array in arrays], tasks, plan, check)


def decoded(module, arrays):
    """What the network itself says, in [-1, 1]."""
    with torch.inference_mode():
        z = torch.stack([torch.tensor(array).float() for array in arrays]) / SCALE
        return module.decode(Whole(), z.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("output", "levels"), [("uint8", 255), ("uint16", 65535)])
def test_a_picture_is_the_output_rounded_to_its_levels(module, plan, output, levels):
    arrays = [latent(seed=seed) for seed in range(2)]
    outcome = run(module, arrays, [Task("decode", TOY, output=output)] * 2, plan)
    expected = np.clip((decoded(module, arrays).astype(np.float64) + 1) / 2 * levels, 0, levels)
    for array, right in zip(outcome.arrays, expected, strict=True):
        assert (array.dtype, array.shape) == (np.dtype(output), (16, 16, 3))
        assert np.abs(array - right).max() <= 0.5 + levels * 1e-5
    assert outcome.finite == [True, True]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("pixel_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize(("output", "rounding"), [("float32", 1e-5), ("float16", 2e-3)])
def test_a_picture_may_be_the_network_s_own_float(module, plan, pixel_range, output, rounding):
    low, high = pixel_range
    model = replace(TOY, family=replace(FAMILY, pixel_range=pixel_range))
    outcome = run(module, [latent()], [Task("decode", model, output=output)], plan)
    expected = (decoded(module, [latent()])[0] - low) / (high - low) * 2 - 1
    assert outcome.arrays[0].dtype == np.dtype(output)
    assert np.abs(expected).max() > 1  # not clamped
    np.testing.assert_allclose(outcome.arrays[0], expected, rtol=rounding / 2, atol=rounding)


def test_a_picture_that_half_precision_cannot_hold_is_not_finite(module):
    glaring = deepcopy(module)
    glaring.decoder.conv_out.weight *= 1e6
    tasks = {name: Task("decode", TOY, output=name) for name in ("float32", "float16", "uint8")}
    finite = {name: run(glaring, [latent()], [task]).finite for name, task in tasks.items()}
    assert finite == {"float32": [True], "float16": [False], "uint8": [True]}


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("pixel_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_picture_may_come_in_floats(module, plan, pixel_range, dtype):
    low, high = pixel_range
    model = replace(TOY, family=replace(FAMILY, pixel_range=pixel_range))
    task = Task("encode", model, moments=True, numbers="float32")
    floats = np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)).astype(dtype)
    kept = floats.copy()
    (moments,) = run(module, [floats], [task], plan).arrays
    np.testing.assert_array_equal(floats, kept)
    with torch.inference_mode():
        pixels = torch.tensor(floats).float().permute(2, 0, 1)[None] * (high - low) / 2 + (high + low) / 2
        expected = module.encode(Whole(), pixels)[0]
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused(module, bad):
    floats = np.zeros((16, 16, 3), np.float32)
    floats[3, 4, 1] = bad
    with pytest.raises(InvalidImage, match="NaN or infinite"):
        run(module, [floats], [Task("encode", TOY)])


def test_moments_are_the_networks_own_whatever_the_convention_and_the_seed(module):
    task = Task("encode", TOY, moments=True, numbers="float32")
    tasks = [task, replace(task, latents="raw", seed=3), replace(task, numbers="float16")]
    wide, other, half = run(module, [picture()] * 3, tasks).arrays
    with torch.inference_mode():
        pixels = torch.tensor(picture()).permute(2, 0, 1)[None] / 127.5 - 1
        expected = module.encode(Whole(), pixels)[0].numpy()
    assert (wide.dtype, half.dtype, wide.shape) == (np.float32, np.float16, (8, 8, 8))
    np.testing.assert_allclose(wide, expected, atol=1e-5)
    np.testing.assert_array_equal(other, wide)
    np.testing.assert_array_equal(half, wide.astype(np.float16))


def test_latents_may_be_float32(module):
    wide, half = run(module, [picture()] * 2, [Task("encode", TOY, numbers="float32"), Task("encode", TOY)]).arrays
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide.astype(np.float16), half)
    assert (wide != half).any()


def test_pixels_that_the_precision_cannot_hold_are_told_from_an_overflow():
    far = np.full((16, 16, 3), 7e4, np.float32)
    half = load(TOY, torch.float16, torch.device("cpu"))
    outcome = run(half, [far, far / 7e4], [Task("encode", TOY)] * 2, ExecutionPlan("fp16", "whole", 2))
    assert outcome.fits == [False, True]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_latent_is_the_scaled_mean_or_a_draw_that_its_seed_repeats(module, plan):
    arrays = [picture(seed=seed) for seed in range(3)]
    tasks = [Task("encode", TOY), Task("encode", TOY, seed=1), Task("encode", TOY, seed=1)]
    outcome = run(module, [arrays[0], arrays[0], arrays[1]], tasks, plan)
    with torch.inference_mode():
        pixels = torch.tensor(arrays[0]).permute(2, 0, 1)[None] / 127.5 - 1
        mean = module.encode(Whole(), pixels).chunk(2, dim=1)[0][0] * SCALE
    assert {array.dtype for array in outcome.arrays} == {np.dtype(np.float16)}
    assert np.abs(outcome.arrays[0] - mean.numpy()).max() <= np.spacing(np.float16(mean.abs().max()))
    assert np.abs(outcome.arrays[0] - outcome.arrays[1]).max() > 0.01
    again = run(module, [arrays[0]], tasks[1:2], plan)
    assert np.abs(again.arrays[0].astype(float) - outcome.arrays[1]).max() <= 1e-3


def test_raw_latents_are_scaled_ones_without_the_factor(module):
    scaled, raw = (
        run(module, [picture()], [Task("encode", TOY, latents=each)]).arrays[0] for each in ("scaled", "raw")
    )
    assert np.allclose(scaled, raw.astype(float) * SCALE, atol=1e-3)
    again = run(module, [raw.astype(np.float32)], [Task("decode", TOY, latents="raw")]).arrays[0]
    expected = run(module, [scaled.astype(np.float32)], [Task("decode", TOY)]).arrays[0]
    assert np.abs(again.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_marks_its_item_only(module, plan, bad):
    arrays = [latent(seed=seed).astype(np.float32) for seed in range(2)]
    arrays[1][0, 0, 0] = bad
    assert run(module, arrays, [Task("decode", TOY)] * 2, plan).finite == [True, False]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("op", "array"), [("decode", latent()), ("encode", picture())])
def test_check_is_called_all_along_and_ends_the_run_by_raising(module, plan, op, array):
    calls = []
    run(module, [array], [Task(op, TOY)], plan, lambda: calls.append(1))
    assert len(calls) > 5

    def enough():
        calls.append(1)
        raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(module, [array], [Task(op, TOY)], plan, enough)
    assert len(calls) == 1


def test_no_gradients_and_channels_last_from_end_to_end(module, monkeypatch):
    seen = []
    conv = torch.nn.functional.conv2d

    def watched(x, weight, *args, **kwargs):
        out = conv(x, weight, *args, **kwargs)
        seen.append((out.is_inference(), x.is_contiguous(memory_format=torch.channels_last)))
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    run(module, [latent()], [Task("decode", TOY)])
    run(module, [picture()], [Task("encode", TOY)])
    assert len(seen) > 10
    assert set(seen) == {(True, True)}


def test_the_probe_believes_a_device_that_computes(monkeypatch):
    compute.probe(torch.device("cpu"))
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, weight: x.sum() + 1)
    with pytest.raises(Unavailable, match="computes wrongly"):
        compute.probe(torch.device("cpu"))


class Event:
    """A CUDA event that says when it was waited for."""

    log: ClassVar[list[str]] = []

    def record(self, stream):
        self.log.append("record")

    def synchronize(self):
        self.log.append("wait")


def test_the_host_is_kept_a_few_layers_before_a_device_that_runs_behind_it(monkeypatch):
    """What is enqueued cannot be cancelled: a check must speak of about now."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "log", [])
    checks = []
    check = compute.Paced(lambda: checks.append(len(Event.log)), torch.device("cuda"))
    for _ in range(10):
        check()
    assert len(checks) == 10
    assert Event.log.count("wait") == 10 - compute.AHEAD
    assert Event.log.index("wait") == compute.AHEAD + 1


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_input_that_the_precision_cannot_hold_is_told_from_an_overflow(module, plan):
    huge = latent().astype(np.float32)
    huge[0, 0, 0] = 7e4
    outcome = run(module, [huge, latent()], [Task("decode", TOY)] * 2, plan)
    assert outcome.fits == [plan.dtype != "fp16", True]
