import asyncio

from app.tools.room import Room


async def test_some_pieces_go_however_large():
    room = Room(10, least=2)
    flying = most = 0

    async def take(amount: int) -> None:
        nonlocal flying, most
        async with room.of(amount):
            flying += 1
            most = max(most, flying)
            await asyncio.sleep(0)
            flying -= 1

    await asyncio.wait_for(asyncio.gather(*(take(100) for _ in range(6))), 5)
    assert most == 2


async def test_what_is_larger_than_all_the_room_goes_alone():
    room, order = Room(10), []

    async def take(amount: int) -> None:
        async with room.of(amount):
            order.append(amount)
            await asyncio.sleep(0)
            order.append(-amount)

    await asyncio.wait_for(asyncio.gather(take(100), take(6), take(4), take(50)), 5)
    assert order[:2] == [100, -100]
    assert order[2:4] == [6, 4]
    assert order[-2:] == [50, -50]
