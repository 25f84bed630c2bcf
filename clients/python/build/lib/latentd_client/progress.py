"""How far a batch is: a bar where tqdm is installed, or a function of the caller's."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeAlias

Progress: TypeAlias = bool | Callable[[int, int | None], object]
"""True for a bar, or a function of how many are done and of how many, None where nobody knows."""


@contextmanager
def counting(progress: Progress, items: Iterable[object]) -> Iterator[Callable[[], object]]:
    """A function to call after each item. Raises ModuleNotFoundError for a bar without tqdm."""
    total = len(items) if isinstance(items, Sized) else None
    if progress is True:
        from tqdm import tqdm

        with tqdm(total=total, disable=None) as bar:
            yield bar.update
    elif progress is False:
        yield lambda: None
    else:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        yield advance
