"""Tells when something in a models folder's directories changes; the system's notifications, no polling."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from watchfiles import Change, awatch

from app.store.tree import Tree
from app.text import shown

DEBOUNCE_MS, STEP_MS = 200, 50
"""Changes that follow each other within a step are one, up to the debounce; watchfiles' own is 1600 ms."""

IDLE_MS = 60_000  # how often the watching thread comes back with nothing


async def changes(tree: Tree, stop: asyncio.Event) -> AsyncGenerator[None, None]:
    """Something happened in the tree's places, or to one of its entries; ends with `stop`.

    Each directory is watched by itself, as links lead anywhere and a tree below one may be the whole disk. Raises
    OSError or RuntimeError where the system cannot watch: a directory has gone, or there are no watches left. A
    directory whose path is not UTF-8 is left out, as watchfiles takes none.
    """
    places = {place.path for place in tree.places}
    elsewhere = {entry.parent for entry in tree.entries} - places
    readable = [
        path
        for path in sorted(places | elsewhere)
        if shown(path) == str(path) and (os.access(path, os.R_OK) or not path.exists())
    ]

    def matters(_: Change, name: str) -> bool:
        path = Path(name)
        if path in places or path in tree.entries:
            return True
        return path.parent in places and not path.name.startswith(".")

    watching = awatch(
        *readable,
        watch_filter=matters,
        debounce=DEBOUNCE_MS,
        step=STEP_MS,
        stop_event=stop,
        rust_timeout=IDLE_MS,
        recursive=False,
        ignore_permission_denied=False,  # else a directory that has gone is no error either
    )
    try:
        async with aclosing(watching):
            async for _ in watching:
                yield
    except ExceptionGroup as group:  # as its threads raise: for one, a file has come whose name is not UTF-8
        _, bugs = group.split((OSError, RuntimeError))
        if bugs is not None:
            raise
        raise RuntimeError("; ".join(str(error) for error in group.exceptions)) from group
