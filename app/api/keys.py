"""The keys that open the service: as the settings give them, or from a file that is read anew as it runs."""

import asyncio
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path

from app.text import reason, shown

log = logging.getLogger("app.api")

LOOK_SECONDS = 1.0
"""A file is read no more often."""
MOST_BYTES = 64 << 10


class Keys:
    """Keys that do not change, none meaning a service that is open; or those of a file, which always has some."""

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        self._file = file
        self._keys = frozenset(given) if file is None else read_keys(file)
        self._looked = time.monotonic()
        self._fault = ""

    async def current(self) -> frozenset[str]:
        """The keys as they are now. A file that cannot be read, or has none in it, leaves those that there were."""
        now = time.monotonic()
        if self._file is not None and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            await asyncio.to_thread(self._look, self._file)
        return self._keys

    def _look(self, file: Path) -> None:
        fault = ""
        try:
            keys = read_keys(file)
        except (OSError, ValueError) as error:
            fault = reason(error)
        else:
            if keys != self._keys:
                log.info("the keys of %s have changed: %d now", shown(file), len(keys))
                self._keys = keys
        if fault and fault != self._fault:
            log.error("the keys of %s stay as they were: %s", shown(file), fault)
        self._fault = fault


def read_keys(file: Path) -> frozenset[str]:
    """The keys in a file, one a line or separated by commas. Raises OSError, and ValueError for a file without any."""
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"expected keys, one a line, in at most {MOST_BYTES} bytes")
    keys = frozenset(part.strip() for part in re.split(r"[,\r\n]", content.decode("utf-8-sig")) if part.strip())
    if not keys:
        raise ValueError("expected keys, one a line; there are none")
    return keys
