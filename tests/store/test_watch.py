"""What is told of a folder, and that the watching ends."""

import asyncio
import os
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from app.store.tree import Tree, walk
from app.store.watch import changes

SECONDS = 2.0


@asynccontextmanager
async def watched(folder: Path):
    """Waits for the next word; false if none comes in time."""
    stop, told = asyncio.Event(), asyncio.Semaphore(0)

    async def listen() -> None:
        async for _ in changes(walk([folder]), stop):
            told.release()

    task = asyncio.create_task(listen())

    async def word(seconds: float = SECONDS) -> bool:
        try:
            await asyncio.wait_for(told.acquire(), seconds)
        except TimeoutError:
            return False
        return True

    await asyncio.sleep(0)
    yield word
    stop.set()
    await asyncio.wait_for(task, SECONDS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "models" / "VAE" / "deep").mkdir(parents=True)
    (tmp_path / "models" / "VAE" / "deep" / "a.pt").touch()
    return tmp_path / "models"


async def test_files_that_come_change_move_and_go(folder):
    path = folder / "VAE" / "deep" / "b.pt"
    async with watched(folder) as word:
        assert not await word(0.3)
        path.write_bytes(b"1")
        assert await word()
        with path.open("r+b") as file:
            file.write(b"2")
        assert await word()
        path.rename(path.with_name("c.pt"))
        assert await word()
        path.with_name("c.pt").unlink()
        assert await word()
        os.utime(path.with_name("a.pt"), ns=(1, 1))
        assert await word()
        (folder / "checkpoints").mkdir()
        assert await word()


async def test_hidden_files_are_not_told_of(folder):
    async with watched(folder) as word:
        (folder / ".latentd-hashes.json").write_text("{}")
        (folder / "VAE" / ".x.part").write_text("x")
        assert not await word(0.5)


async def test_linked_folders_and_targets_of_links(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tree").mkdir(parents=True)
    for name in ("target.pt", "other.pt"):
        (elsewhere / name).touch()
    (folder / "VAE" / "linked").symlink_to(elsewhere / "tree")
    (folder / "VAE" / "a.pt").symlink_to(elsewhere / "target.pt")
    async with watched(folder) as word:
        (elsewhere / "tree" / "new.pt").touch()
        assert await word()
        (elsewhere / "target.pt").write_bytes(b"1")
        assert await word()
        (elsewhere / "other.pt").write_bytes(b"1")  # nobody's business
        assert not await word(0.5)


async def test_a_folder_that_appears(tmp_path):
    folder = tmp_path / "not" / "yet"
    async with watched(folder) as word:
        (tmp_path / "other").mkdir()
        assert not await word(0.5)
        folder.mkdir(parents=True)
        assert await word()


async def test_a_folder_that_goes(folder):
    async with watched(folder) as word:
        folder.rename(folder.with_name("gone"))
        assert await word()


async def test_a_place_that_is_not_there_is_an_error(folder):
    tree = walk([folder])
    (folder / "VAE" / "deep" / "a.pt").unlink()
    (folder / "VAE" / "deep").rmdir()
    with pytest.raises(OSError, match=r"No such|not found"):
        await anext(changes(tree, asyncio.Event()))


async def test_no_thread_is_left(folder):
    before = threading.active_count()
    for _ in range(3):
        async with watched(folder):
            pass
    assert threading.active_count() <= before + 1  # anyio keeps one for later


async def test_nothing_to_watch_waits_for_the_end():
    stop = asyncio.Event()
    events = changes(Tree(), stop)
    task = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.1)
    stop.set()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(task, SECONDS)


async def test_names_that_are_not_utf_8(folder):
    """watchfiles takes no such directory, and ends when such a file comes: that must be an error that is handled."""
    (folder / "VAE" / os.fsdecode(b"caf\xe9")).mkdir()
    async with watched(folder) as word:
        (folder / "VAE" / "b.pt").touch()
        assert await word()
    events = changes(walk([folder]), asyncio.Event())
    task = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.3)
    (folder / "VAE" / os.fsdecode(b"caf\xe9.pt")).touch()
    with pytest.raises(RuntimeError, match="Unable to decode path"):
        await asyncio.wait_for(task, SECONDS)
