import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.tools import order
from app.tools.order import by_size
from app.tools.paths import Item
from tests.service import picture


async def ordered(items, window, monkeypatch):
    monkeypatch.setattr(order, "WINDOW", window)
    with ThreadPoolExecutor(1) as threads:
        loop = asyncio.get_running_loop()

        def in_thread(function, *arguments):
            return loop.run_in_executor(threads, function, *arguments)

        return [item async for item in by_size(items, lambda header: header.shown, in_thread)]


@pytest.mark.parametrize("window", [6, 3, 1])
async def test_pictures_of_one_size_follow_each_other_within_a_window(tmp_path, monkeypatch, window):
    sides = {"a": (32, 32), "b": (16, 16), "c": (48, 48), "d": (16, 16), "e": (48, 48), "f": (16, 16)}
    for name, size in sides.items():
        (tmp_path / name).write_bytes(picture(*size))
    items = [Item(tmp_path / name, None) for name in sides]
    names = [item.source.name for item in await ordered(items, window, monkeypatch)]
    sizes = [sides[name] for name in names]
    for at in range(0, len(names), window):
        assert sizes[at : at + window] == sorted(sizes[at : at + window])
        assert sorted(names[at : at + window]) == sorted(list(sides)[at : at + window])


async def test_what_cannot_be_read_is_not_lost(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(picture())
    (tmp_path / "b").write_text("no picture")
    items = [Item(tmp_path / name, None) for name in ("a", "b", "missing")] + [Item(None, None)]
    assert set(await ordered(items, 10, monkeypatch)) == set(items)
