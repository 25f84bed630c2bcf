import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.engine.batcher import Admission
from app.engine.engine import RUNS
from app.engine.jobs import Task, Work
from app.errors import InvalidLatent, UnknownModel
from app.store.checkpoint import CheckpointChanged
from tests.fakes import checkpoint, latent, picture, running, submit

TOY = checkpoint("toy")
NEW = replace(checkpoint("new"), name="toy")  # the same name, another file


async def test_a_name_and_arrays_are_all_that_a_program_needs():
    async with running(TOY) as engine:
        (decoded,) = await engine.run("toy", partial(Task, "decode"), [latent()])
        (same,) = await submit(engine, Task("decode", TOY), latent())
        assert np.array_equal(decoded.array, same.array)
        encoded = await engine.run("toy", partial(Task, "encode", latents="raw"), [picture(seed=1), picture(seed=2)])
        assert [result.array.shape for result in encoded] == [(4, 8, 8)] * 2
        with pytest.raises(InvalidLatent, match="takes scaled latents of 4 channels"):
            await engine.run("toy", partial(Task, "decode"), [latent()[:3]])


class Folder:
    """A model whose file is replaced while requests wait: each wait lists the next of what it becomes."""

    def __init__(self, engine, monkeypatch, *then):
        self.now, self.then = TOY, list(then)
        self.ran: list[str] = []
        self._run = Admission.run
        monkeypatch.setattr(engine, "resolve", self.resolve)
        monkeypatch.setattr(engine, "replaced", self.replaced)
        folder = self

        async def run(admission, arrays):
            folder.ran.append(admission._task.checkpoint.sha256)
            if admission._task.checkpoint is not folder.now or folder.then:
                raise CheckpointChanged("replaced")
            return await folder._run(admission, arrays)

        monkeypatch.setattr(Admission, "run", run)

    async def resolve(self, model):
        if self.now is None:
            raise UnknownModel(f"no model {model}")
        return self.now

    async def replaced(self, checkpoint, deadline):
        assert checkpoint is self.now
        self.now = self.then.pop(0)


async def test_a_model_that_is_replaced_meanwhile_is_prepared_and_run_anew(monkeypatch):
    async with running(TOY, NEW) as engine:
        folder = Folder(engine, monkeypatch, NEW)
        prepared = []

        def prepare(model):
            prepared.append(model)
            return Work([(Task("decode", model), [(4, 8, 8)])], lambda admission: admission.run([latent()]))

        async with engine.request(TOY, "toy", prepare, None) as run:
            await run()
        assert prepared == [TOY, NEW]
        assert folder.ran == [TOY.sha256, NEW.sha256]
        assert engine.workers[0].batcher.items == 0


async def test_one_that_is_removed_meanwhile_is_unknown(monkeypatch):
    async with running(TOY) as engine:
        Folder(engine, monkeypatch, None)
        with pytest.raises(UnknownModel):
            await engine.run("toy", partial(Task, "decode"), [latent()])
        assert engine.workers[0].batcher.items == 0


async def test_one_that_never_keeps_still_is_given_up(monkeypatch):
    async with running(TOY) as engine:
        folder = Folder(engine, monkeypatch, *[TOY] * 9)
        with pytest.raises(CheckpointChanged):
            await engine.run("toy", partial(Task, "decode"), [latent()])
        assert len(folder.ran) == RUNS
        assert engine.workers[0].batcher.items == 0


async def test_a_work_of_two_parts_has_room_for_both_before_the_first_begins():
    async with running(TOY) as engine:

        async def there_and_back(there, back):
            assert engine.workers[0].batcher.items == 2
            (latents,) = await there.run([picture()])
            (pictures,) = await back.run([latents.array])
            return pictures.array

        def prepare(model):
            return Work([(Task("encode", model), [(16, 16, 3)]), (Task("decode", model), [(4, 8, 8)])], there_and_back)

        async with engine.request(TOY, "toy", prepare, None) as run:
            assert (await run()).shape == (16, 16, 3)


@pytest.fixture
def example(monkeypatch):
    """The code that docs/engine.md shows, as a reader would paste it."""
    monkeypatch.chdir(Path(__file__).parents[2])
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/engine.md").read_text(encoding="utf-8"), re.DOTALL)
    return compile(code, "engine.md", "exec")


async def test_the_example_in_the_documentation_runs(example):
    names: dict[str, Any] = {}
    exec(example, names)
    picture_there, picture_back = await names["main"]()
    assert picture_back.shape == picture_there.shape
    assert np.abs(picture_back.astype(float) - picture_there).mean() < 12
