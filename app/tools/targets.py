"""The files that one input becomes: itself, its pictures, its mirrored twin, a cache under a name of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app.errors import InvalidInput
from app.tools import kohya
from app.tools.paths import Item, named


def part(target: Path, index: int) -> Path:
    """Of a file with several pictures, the file of one."""
    return target.with_name(f"{target.stem}-{index:04}{target.suffix}")


def twin(target: Path) -> Path:
    """Of a picture's latent, that of its mirrored twin."""
    return target.with_name(f"{target.stem}-flipped{target.suffix}")


def check_twins(items: Sequence[Item]) -> None:
    """Raises InvalidInput where a twin would be written over another picture's latent, or to stdout."""
    if any(item.target is None for item in items):
        raise InvalidInput("--flip writes two latents: name a file or a folder, not -")
    targets = {item.target for item in items}
    if both := sorted(str(item.target) for item in items if item.target and twin(item.target) in targets):
        raise InvalidInput(f"the mirrored twins of {named(both)} would be written over others: give them other names")


def present(items: Sequence[Item], op: str) -> dict[Path, Path]:
    """The targets that are there, each with the file that shows it."""
    found: dict[Path, Path] = {}
    for item in items:
        for path in () if item.target is None else (item.target, part(item.target, 0))[: 1 + (op == "decode")]:
            if item.target is not None and path.exists():
                found.setdefault(item.target, path)
    return found


def cached(items: Sequence[Item], folder: Path, form: kohya.Form) -> dict[Path, Path]:
    """The same of kohya's caches, whose names say more than their picture's."""
    there: Mapping[Path, Path] = kohya.existing(folder, form)
    return {
        item.target: there[item.target.with_suffix("")]
        for item in items
        if item.target is not None and item.target.with_suffix("") in there
    }
