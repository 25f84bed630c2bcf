import asyncio
import time

import pytest
import torch

from app.engine.jobs import Task
from tests.fakes import Forwards, checkpoint, latent, running, submit, until

TOY, OTHER, LOUD = checkpoint("toy"), checkpoint("other"), checkpoint("loud")


@pytest.fixture
def forwards(monkeypatch):
    return Forwards(monkeypatch)


async def one_behind_another(engine, forwards, first, second):
    """A running batch and one whose first forward is sent, both held at the door of the device; to be released."""
    before = asyncio.ensure_future(submit(engine, first, latent()))
    await until(forwards.entered.is_set)
    behind = asyncio.ensure_future(submit(engine, second, latent()))
    await until(lambda: engine.workers[0]._staged is not None)
    assert engine.workers[0]._staged.first is not None
    return before, behind


async def test_the_next_batch_begins_without_the_event_loop(forwards):
    async with running(TOY, OTHER) as engine:
        await engine.load(OTHER, "auto")
        with forwards.held():
            work = await one_behind_another(engine, forwards, Task("decode", TOY), Task("decode", OTHER))
        end = time.monotonic() + 60
        while len(forwards.log) < 2 and time.monotonic() < end:
            time.sleep(0.001)  # noqa: ASYNC251  the loop is to stand still
        assert [name for name, _, _ in forwards.log] == ["toy", "other"]
        results = await asyncio.gather(*work)
        assert [result.plan for (result,) in results] == ["fp32/whole"] * 2
        assert all(result.seconds["queue"] >= 0 for (result,) in results)


async def test_it_waits_where_the_batch_before_has_something_left_to_do(forwards):
    async with running(LOUD, TOY, precision="fp16") as engine:
        await engine.load(TOY, "auto")
        with forwards.held():
            work = await one_behind_another(engine, forwards, Task("decode", LOUD), Task("decode", TOY))
        await asyncio.gather(*work)
        assert forwards.log == [("loud", "fp16/whole", 1), ("loud", "fp32/whole", 1), ("toy", "fp16/whole", 1)]


@pytest.mark.parametrize("failing", [True, False])
async def test_it_has_a_turn_when_the_batch_before_fails(forwards, failing):
    def before(inputs, plan):
        if failing and len(forwards.log) == 1:
            raise ValueError("poison")

    forwards.before = before
    async with running(TOY, OTHER) as engine:
        await engine.load(OTHER, "auto")
        with forwards.held():
            work = await one_behind_another(engine, forwards, Task("decode", TOY), Task("decode", OTHER))
        await asyncio.wait(work)
        assert isinstance(work[0].exception(), ValueError) == failing
        assert work[1].result()[0].plan == "fp32/whole"
        assert [name for name, _, _ in forwards.log] == ["toy", "other"]


async def test_what_needs_the_room_of_the_running_batch_is_not_sent_ahead(forwards):
    """Its plan is chosen in its turn, when what runs has let go of its weights."""
    async with running(TOY) as engine:
        whole = (await engine.plan(Task("decode", TOY), (4, 64, 64))).plans["fp32/whole"]
    room = OTHER.weight_bytes(torch.float32) + whole
    async with running(TOY, OTHER, memory_limit_bytes=room) as engine:
        with forwards.held():
            before = asyncio.ensure_future(submit(engine, Task("decode", TOY), latent()))
            await until(forwards.entered.is_set)
            behind = asyncio.ensure_future(submit(engine, Task("decode", OTHER), latent(64)))
            worker = engine.workers[0]
            await until(lambda: worker._staged is not None)
            assert worker._staged is not None
            assert worker._staged.first is None
        await before
        (result,) = await behind
        assert (result.plan, result.reason) == ("fp32/whole", None)
