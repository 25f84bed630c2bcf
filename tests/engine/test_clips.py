"""A clip is a job in slices: others have their turn between them, and its end, whatever it is, leaves nothing."""

import asyncio
import time
from collections import deque
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from app.engine import compute
from app.engine.forecast import MARGIN, CountingMode, Forecaster, count, network_shape
from app.engine.jobs import Task
from app.engine.planning import TORCH_DTYPES, ExecutionPlan
from app.errors import DeadlineExceeded, InvalidLatent, InvalidParameter, NonFiniteOutput, OutOfMemory, Overloaded
from app.execution.causal import Carry, carried_bytes
from app.execution.slices import Sliced
from app.vae.architectures import architecture_of
from app.vae.families import FAMILIES
from tests.fakes import LIMITS, checkpoint, running, until, value
from tests.store.weights import wan_config

PICTURES = replace(checkpoint("wan"), config=wan_config(), family=FAMILIES["wan21"])
WAN = PICTURES.for_clips()
DECODE = Task("decode", WAN, latents="raw")


def load(checkpoint, dtype, device):
    """Random weights, the same each time."""
    torch.manual_seed(0)
    module: Any = architecture_of(checkpoint.config).module(checkpoint.config).eval().requires_grad_(False)
    if checkpoint.name == "loud":
        module.decoder.conv1.weight *= 1e7
    for weight in module.parameters():
        if weight.dim() > 3:
            layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=layout)
    return module.to(device, dtype)


def latents(frames=3, side=4):
    return np.random.default_rng(0).standard_normal((16, frames, side, side)).astype(np.float32)


def clip_pixels(frames=9, side=32):
    return np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)


async def split(array, sizes, axis):
    start = 0
    for size in sizes:
        yield array.take(range(start, start + size), axis)
        start += size


def by_latent(array):
    return split(array, [1] * array.shape[1], 1)


async def decoded(engine, array, task=DECODE, deadline=None):
    """The slices of a clip, latent by latent."""
    async with (
        engine.admit(task, [array.shape], deadline) as admission,
        aclosing(admission.slices(by_latent(array))) as slices,
    ):
        return [result async for result in slices]


def held(engine):
    return sum(clip.held for clip in engine.workers[0].cache.clips)


async def test_slices_are_the_clip_both_ways():
    module = load(WAN, torch.float32, torch.device("cpu"))
    z, pixels = latents(), clip_pixels()
    async with running(load=load) as engine:
        results = await decoded(engine, z)
        assert [result.array.shape for result in results] == [(1, 32, 32, 3), (4, 32, 32, 3), (4, 32, 32, 3)]
        assert {result.plan for result in results} == {"fp32/whole"}
        task = Task("encode", WAN, latents="raw", numbers="float32")
        async with engine.admit(task, [pixels.shape], None) as admission:
            found = [each.array async for each in admission.slices(split(pixels, [1, 4, 4], 0))]
    with torch.inference_mode():
        frames = module.decode(Sliced(deque()), torch.from_numpy(z).transpose(0, 1))
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = module.encode(Sliced(deque()), x)[:, :16].transpose(0, 1).numpy()
    expected = ((frames.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(np.concatenate([each.array for each in results]).astype(float) - expected).max() <= 1
    np.testing.assert_allclose(np.concatenate(found, axis=1), mean, atol=1e-5 * np.ptp(mean))


async def test_pictures_have_their_turn_between_slices():
    async with running(load=load) as engine:
        order = []

        async def clip():
            async with engine.admit(DECODE, [latents(6).shape], None) as admission:
                async for _ in admission.slices(by_latent(latents(6))):
                    order.append("slice")

        going = asyncio.ensure_future(clip())
        await until(lambda: bool(order))
        task = Task("decode", PICTURES, latents="raw")
        async with engine.admit(task, [(16, 4, 4)], None) as admission:
            await admission.run([latents()[:, 0]])
        order.append("picture")
        await going
        assert order.index("picture") <= 4, "behind the slice that runs and the one that is queued"
        assert order[-1] == "slice"


@pytest.mark.parametrize("ending", ["read", "left", "cancelled", "late"])
async def test_a_clip_that_ends_leaves_nothing(ending):
    z = latents(4)
    async with running(load=load) as engine:
        worker = engine.workers[0]
        async with engine.admit(DECODE, [z.shape], None) as admission:
            assert worker.batcher.pixels == 4 * 4 * 32 * 32
            slices = admission.slices(by_latent(z))
            free = worker.cache.free
            await anext(slices)
            assert held(engine) > 0
            assert worker.cache.free <= free - held(engine)
            assert worker.batcher.pixels == 3 * 4 * 32 * 32
            if ending == "read":
                assert len([each async for each in slices]) == 3
            elif ending == "left":
                await slices.aclose()
            elif ending == "cancelled":
                going = asyncio.ensure_future(anext(slices))
                await until(lambda: worker.busy)
                going.cancel()
                await asyncio.wait([going])
            else:
                admission._deadline = time.monotonic() - 1
                with pytest.raises(DeadlineExceeded):
                    await anext(slices)
        await until(lambda: not worker.busy)
        assert held(engine) == 0
        assert (worker.batcher.items, worker.batcher.pixels, worker.batcher.wait_seconds()) == (0, 0, 0)
        assert all(resident.in_use == 0 for resident in worker.cache.residents())


async def test_a_clip_is_admitted_as_a_whole():
    z = latents(9)
    async with running(load=load, limits=replace(LIMITS, pixels=1 << 15)) as engine:
        async with engine.admit(DECODE, [z.shape], None):  # alone, it may be larger than the queue's half
            assert engine.workers[0].batcher.pixels == 9 * 4 * 32 * 32
            with pytest.raises(Overloaded, match="the queue is full"):
                async with engine.admit(DECODE, [z.shape], None):
                    pass
        with pytest.raises(InvalidLatent, match="16 channels"):
            async with engine.admit(DECODE, [(4, 3, 8, 8)], None):
                pass


async def test_memory_decides_between_frames_carried_over_rows_and_rows_over_time():
    """The same clip as slices that are whole, as slices in bands, and in bands of all its frames."""
    z = latents(3, side=16)
    forecaster = Forecaster("cpu")
    slices = network_shape(WAN, "decode", 128, 128)
    whole, strips = (forecaster.peak(slices, ExecutionPlan("fp32", name, 1)) for name in ("whole", "strips"))
    at_once = forecaster.peak(replace(slices, frames=3), ExecutionPlan("fp32", "strips", 1))
    assert whole > strips > at_once
    weights, found = WAN.weight_bytes(torch.float32), {}
    for room in (whole, strips, at_once):
        async with running(load=load, memory_limit_bytes=weights + room) as engine:
            results = await decoded(engine, z)
            found[room] = np.concatenate([each.array for each in results]), [each.plan for each in results]
    assert [plans for _, plans in found.values()] == [["fp32/whole"] * 3, ["fp32/strips"] * 3, ["fp32/strips"]]
    for frames, _ in found.values():
        assert np.abs(frames.astype(int) - found[whole][0]).max() <= 1


async def test_a_clip_in_midst_of_which_memory_ends_fails(monkeypatch):
    """What its layers carried is gone: nothing goes on from there, not even in bands."""
    forward = compute.forward_slice

    def full(module, frames, task, plan, carry, check):
        if carry:
            raise torch.OutOfMemoryError("full")
        return forward(module, frames, task, plan, carry, check)

    monkeypatch.setattr(compute, "forward_slice", full)
    async with running(load=load) as engine:
        with pytest.raises(OutOfMemory):
            await decoded(engine, latents(2))
        assert held(engine) == 0


async def test_a_clip_that_does_not_fit_says_so_before_its_first_frame():
    weights = WAN.weight_bytes(torch.float32)
    async with running(load=load, memory_limit_bytes=weights + (6 << 20)) as engine:
        with pytest.raises(OutOfMemory, match="in the smallest plan"):
            await decoded(engine, latents(2, side=32))


async def test_two_clips_share_nothing_but_the_weights():
    async with running(load=load) as engine:
        alone = await decoded(engine, latents(3))
        both = await asyncio.gather(decoded(engine, latents(3)), decoded(engine, -latents(3)))
        assert value(engine, "vae_model_loads_total") == 1
        for one, other in zip(alone, both[0], strict=True):
            assert np.array_equal(one.array, other.array)


async def test_the_first_slice_settles_the_precision():
    loud = replace(WAN, name="loud", sha256="1" * 64)
    async with running(load=load, precision="fp16") as engine:
        results = await decoded(engine, latents(2), replace(DECODE, checkpoint=loud))
        assert [result.plan for result in results] == ["fp32/whole"] * 2
        with pytest.raises(NonFiniteOutput):
            await decoded(engine, latents(2), replace(DECODE, checkpoint=loud, precision="fp16"))
        assert held(engine) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["encode", "decode"])
def test_the_count_of_a_slice_covers_the_real_tensors(op, dtype):
    wan = replace(PICTURES, config=wan_config(width=16)).for_clips()
    module = load(wan, TORCH_DTYPES[dtype], torch.device("cpu"))
    carry: Carry = deque()
    plan = ExecutionPlan(dtype, "whole", 1)
    with CountingMode(module.state_dict().values()) as mode:
        for frames in (1, 4, 4):
            array = clip_pixels(frames, 128) if op == "encode" else latents(1, 16)
            compute.forward_slice(module, torch.from_numpy(array), Task(op, wan), plan, carry, lambda: None)
        assert carried_bytes(carry) < mode.alive + 1
    counted = count(network_shape(wan, op, 128, 128), plan, torch.device("cpu"))
    assert 1.0 <= counted * MARGIN / mode.peak <= 1.25


def test_weights_of_pictures_alone_take_no_clips():
    with pytest.raises(InvalidParameter, match="is for pictures"):
        checkpoint("toy").for_clips()
