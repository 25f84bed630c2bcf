"""Standard output that takes any text, and fails where an error can still be told."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path


def open_stdout() -> None:
    """Makes stdout take any text, a file's name in another encoding too; a closed one takes it and loses it."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def flushed_stdout() -> Iterator[None]:
    """Writes what was printed before the end of the process, where a failure would be a traceback. Raises OSError."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())  # what is left in the buffer goes there
            os.close(null)
            raise
