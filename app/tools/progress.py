"""How far a long command is: a bar where there is a terminal, a line now and then where there is none."""

import sys
import time
from typing import Any, Self

from tqdm import tqdm

EVERY = 5.0
"""Seconds between two lines."""


class Progress:
    """Counts up to `total` on stderr; `say` writes a line of its own."""

    def __init__(self, total: int, unit: str = "file") -> None:
        self._total = total
        self._unit = unit
        self._done = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = tqdm(total=total, unit=unit) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            rate = self._done / (now - self._began)
            left = tqdm.format_interval(round((self._total - self._done) / rate))
            self.say(f"{self._done} of {self._total}, {rate:.1f} {self._unit}s/s, {left} left")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            tqdm.write(f"latentd: {text}", file=sys.stderr)
        else:
            sys.stderr.write(f"latentd: {text}\n")
