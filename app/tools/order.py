"""Files in an order that batches like: those of one size together, over a window that is looked at ahead."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from app.errors import ServiceError
from app.tools.paths import Item
from app.wire.headers import PictureHeader, read_header

WINDOW = 512
"""Files that are sorted at a time: small beside a hundred thousand, so that the first ones need not wait."""

HEAD = 1 << 17
"""Bytes of a file that are looked at; a size that comes later is none."""

Key = Callable[[PictureHeader], Any]
InThread = Callable[..., Any]
"""Runs a function in one of the command's threads; awaited."""


async def by_size(items: Sequence[Item], key: Key, in_thread: InThread) -> AsyncGenerator[Item]:
    """The items, sorted by the key of their headers within each window; the next one is read meanwhile."""
    windows = [items[at : at + WINDOW] for at in range(0, len(items), WINDOW)]
    ahead: asyncio.Future[list[Item]] | None = None
    try:
        for index in range(len(windows)):
            window = await (ahead or asyncio.ensure_future(in_thread(_sorted, windows[index], key)))
            following = windows[index + 1 : index + 2]
            ahead = asyncio.ensure_future(in_thread(_sorted, following[0], key)) if following else None
            for item in window:
                yield item
    finally:
        if ahead is not None:
            ahead.cancel()


def _sorted(items: Sequence[Item], key: Key) -> list[Item]:
    return sorted(items, key=lambda item: (0, 0) if item.source is None else _key(item.source, key))


def _key(source: Path, key: Key) -> Any:
    """What cannot be read comes first, and fails where it is read again."""
    try:
        with source.open("rb") as file:
            return key(read_header(file.read(HEAD)))
    except (OSError, ServiceError):
        return (0, 0)
