import asyncio
import json

import numpy as np
import pytest

from app.engine import previews as module
from app.engine.jobs import Task
from app.engine.previews import Previews
from app.engine.worker import Worker
from app.errors import Overloaded
from app.store.linear import FILE, Key, Linear, LinearMaps
from tests.fakes import Forwards, checkpoint, latent, running, submit, until

TOY, OTHER = checkpoint("toy"), checkpoint("other")


@pytest.fixture
def forwards(monkeypatch):
    return Forwards(monkeypatch)


async def test_a_running_preview_is_dropped_when_work_comes(forwards):
    async with running(TOY, OTHER) as engine:
        with forwards.held():
            spare = asyncio.ensure_future(submit(engine, Task("decode", TOY, rank="spare"), latent()))
            await until(lambda: engine.workers[0].busy)
            work = asyncio.ensure_future(submit(engine, Task("decode", OTHER), latent()))
            with pytest.raises(Overloaded, match="dropped first"):
                await spare
        [result] = await work
        assert result.array.shape == (16, 16, 3)


async def test_a_batch_that_has_not_begun_yet_is_known_to_the_next_one(monkeypatch):
    """A model that has come while a batch was staged is next at once, before the event loop runs that batch."""
    async with running(TOY, OTHER) as engine:
        await engine.load(TOY, "auto")
        worker, stage = engine.workers[0], Worker._stage

        async def slowly(worker, turn):
            if turn.jobs[0].task.checkpoint is TOY:
                await asyncio.wait([worker._turns.cold.loading])
            return await stage(worker, turn)

        monkeypatch.setattr(Worker, "_stage", slowly)
        cold = asyncio.ensure_future(submit(engine, Task("decode", OTHER), latent()))
        await until(lambda: worker._turns.cold is not None)
        await submit(engine, Task("decode", TOY), latent())
        await cold


async def test_what_is_fitted_is_not_dropped_and_waits_for_all_work(forwards):
    async with running(TOY, OTHER) as engine:
        with forwards.held():
            work = asyncio.ensure_future(submit(engine, Task("decode", TOY), latent()))
            await until(lambda: engine.workers[0].busy)
            later = asyncio.ensure_future(submit(engine, Task("decode", OTHER, rank="later"), latent()))
            await until(lambda: engine.workers[0].batcher.items == 1)
            more = [asyncio.ensure_future(submit(engine, Task("decode", TOY), latent(side))) for side in (4, 6)]
            await until(lambda: engine.open_requests == 4)
        for task in (work, *more, later):
            await task
        assert [name for name, _, _ in forwards.log][-1] == "other"


async def test_a_fit_that_failed_is_tried_again_by_the_next_preview(tmp_path, caplog, monkeypatch):
    async with running(TOY) as engine:
        engine.store.folders = (tmp_path,)
        failing = [True]

        def pictures(side):
            if failing:
                raise Overloaded("not now", 1.0)
            return [np.full((side, side, 3), 60 * index, np.uint8) for index in range(3)]

        previews = Previews(engine, pictures)
        assert previews.linear(TOY, "raw") is None
        await until(lambda: not previews._work)
        assert "not fitted" in caplog.text
        failing.clear()
        monkeypatch.setattr(previews._maps, "folder_of", lambda path: tmp_path)
        assert previews.linear(TOY, "raw") is None
        assert previews.linear(TOY, "raw") is None  # one fit, however many ask
        assert len(previews._work) == 1
        await until(lambda: not previews._work)
        assert previews.linear(TOY, "raw") is not None
        await previews.close()
    assert json.loads((tmp_path / FILE).read_text())["rows"][0]["family"] == "toy"


async def test_beside_work_on_a_cpu_there_is_a_most_a_second(forwards, monkeypatch):
    monkeypatch.setattr(module, "RATE", 1e-3)
    async with running(TOY) as engine:
        engine.store.folders = ()
        previews = Previews(engine, lambda side: [])

        def entered(times):
            for _ in range(times):
                with previews.entered():
                    pass

        with forwards.held():
            spare = asyncio.ensure_future(submit(engine, Task("decode", TOY, rank="spare"), latent()))
            await until(lambda: engine.workers[0].busy)
            entered(3 * module.MOST)  # a preview is no work
        await spare
        entered(3 * module.MOST)
        with forwards.held():
            work = asyncio.ensure_future(submit(engine, Task("decode", TOY), latent()))
            await until(lambda: engine.workers[0].busy)
            entered(module.MOST)
            with pytest.raises(Overloaded, match="a second"):
                entered(2)
        await work
        entered(3 * module.MOST)


async def test_fits_that_wait_for_each_other_end_with_the_service(tmp_path, forwards):
    async with running(TOY, OTHER) as engine:
        engine.store.folders = (tmp_path,)
        previews = Previews(engine, lambda side: [np.zeros((side, side, 3), np.uint8)] * 2)
        with forwards.held():
            assert [previews.linear(each, "raw") for each in (TOY, OTHER)] == [None, None]
            await until(lambda: engine.workers[0].busy)
            await previews.close()
        assert previews._work == {}


async def test_there_is_a_most_at_once(monkeypatch):
    monkeypatch.setattr(module, "MOST", 1)
    async with running(TOY) as engine:
        engine.store.folders = ()
        previews = Previews(engine, lambda side: [])
        with previews.entered(), pytest.raises(Overloaded), previews.entered():
            pass
        with previews.entered():
            pass


def test_a_file_that_is_torn_or_another_s_has_no_maps(tmp_path):
    key: Key = ("a" * 64, "sd1", "raw")
    maps = LinearMaps([tmp_path])
    maps.put(key, Linear(np.ones((5, 3), np.float32), 20.0), tmp_path)

    def read():
        again = LinearMaps([tmp_path])
        again.load()
        return again.get(key)

    assert read().psnr_db == 20.0
    good = json.loads((tmp_path / FILE).read_text())
    bad = [{"version": 0}, [], {"version": 1, "rows": [{"sha256": 1}]}]
    for row in ({"weights": [[1, 2]]}, {"weights": [[1, "x", 2]]}, {"psnr_db": float("nan")}, {"latents": "blue"}):
        bad.append(good | {"rows": [good["rows"][0] | row]})
    for content in bad:
        (tmp_path / FILE).write_text(json.dumps(content))
        assert read() is None
    (tmp_path / FILE).write_text('{"version": 1, "rows"')
    assert read() is None
