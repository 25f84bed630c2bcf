import asyncio

import pytest

from app.api.door.room import Held, Room
from app.errors import TooManyBytes


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_bodies_share_the_room_and_give_it_back():
    room = Room(100)
    first, second = Held(room), Held(room)
    first.take(60)
    with pytest.raises(TooManyBytes, match="41, with the 60 that other requests hold, are more than 100"):
        second.take(41)
    second.take(40)
    first.give_back()
    first.give_back()
    assert room.used == 40
    second.give_back()
    assert room.used == 0


def test_what_is_larger_than_the_room_is_let_in_alone():
    room = Room(100)
    alone, other = Held(room), Held(room)
    alone.take(150)
    alone.take(10)  # it grows as it comes, and is alone still
    with pytest.raises(TooManyBytes):
        other.take(1)
    alone.give_back()
    other.take(1)
    with pytest.raises(TooManyBytes):
        alone.take(150)


def test_an_answer_is_there_already():
    room = Room(100)
    held = Held(room)
    held.take(90)
    held.add(90)
    assert room.used == 180
    held.give_back()
    assert room.used == 0


async def test_work_waits_for_its_turn():
    room = Room(100)
    await room.enter(60)
    large, small = asyncio.ensure_future(room.enter(50)), asyncio.ensure_future(room.enter(10))
    await turns()
    assert not large.done()
    assert not small.done()  # it would fit, but came later
    room.leave(60)
    await asyncio.gather(large, small)
    assert room.used == 60


async def test_one_piece_of_work_always_gets_in():
    room = Room(100)
    room.take(90, own=0)  # by those who wait here, it may be
    await room.enter(500)
    second = asyncio.ensure_future(room.enter(1))
    await turns()
    assert not second.done()
    room.leave(500)
    await second
    assert room.used == 91


async def test_work_that_is_cancelled_holds_nothing():
    room = Room(100)
    await room.enter(100)
    waiting, behind = asyncio.ensure_future(room.enter(80)), asyncio.ensure_future(room.enter(10))
    await turns()
    waiting.cancel()
    await turns()
    room.leave(100)
    await behind
    assert room.used == 10
    room.leave(10)

    await room.enter(100)
    let_in = asyncio.ensure_future(room.enter(50))
    await turns()
    room.leave(100)
    let_in.cancel()  # at once
    await turns()
    assert let_in.cancelled()
    assert room.used == 0
    await room.enter(100)
