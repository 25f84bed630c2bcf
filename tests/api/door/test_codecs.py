import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app.api.door.codecs import Codecs
from app.api.door.room import Room
from tests.service import until


@asynccontextmanager
async def codecs(total: int = 100, threads: int = 1) -> AsyncIterator[tuple[Codecs, Room]]:
    room = Room(total)
    made = Codecs(room, threads)
    yield made, room
    await made.close()


async def test_work_has_its_room_while_it_runs():
    async with codecs() as (made, room):
        assert await made.run(70, lambda: room.used) == 70
        await until(lambda: room.used == 0)
        with pytest.raises(ZeroDivisionError):
            await made.run(70, lambda: 1 // 0)
        await until(lambda: room.used == 0)


async def test_what_is_cancelled_in_the_queue_never_begins_and_what_began_keeps_its_room():
    async with codecs() as (made, room):
        gate, began = threading.Event(), threading.Event()
        ran = []

        def first() -> None:
            began.set()
            assert gate.wait(60)

        tasks = [asyncio.ensure_future(made.run(30, first)), asyncio.ensure_future(made.run(30, lambda: ran.append(1)))]
        await until(began.is_set)
        await until(lambda: room.used == 60)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: room.used == 30)  # a decoder cannot be stopped: its memory is not free
        gate.set()
        await until(lambda: room.used == 0)
        assert not ran


async def test_no_more_at_once_than_there_is_room_for():
    async with codecs(total=100, threads=4) as (made, _):
        at_once, most, lock = 0, 0, threading.Lock()
        gate = threading.Event()

        def work() -> None:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            gate.wait(0.02)
            with lock:
                at_once -= 1

        await made.run_all([(50, work)] * 8)
        assert most <= 2


async def test_the_first_error_ends_what_has_not_begun():
    async with codecs() as (made, room):
        ran = []
        with pytest.raises(ZeroDivisionError):
            await made.run_all([(1, lambda: 1 // 0), *[(100, lambda: ran.append(1))] * 50])
        await until(lambda: room.used == 0)
        assert len(ran) < 50
        assert await made.run_all([(1, int), (1, int)]) == [0, 0]
