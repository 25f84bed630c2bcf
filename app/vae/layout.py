"""Layouts: other names and shapes for the same tensors. What the tables of all architectures have in common."""

from collections.abc import Iterable

from app.errors import UnsupportedCheckpoint


def replaced(key: str, table: Iterable[tuple[str, str]]) -> str:
    """The key with runs of whole components replaced, (old, new) by (old, new): `to_out.0` but not `auto_out.01`."""
    dotted = f".{key}."
    for old, new in table:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def unlike(what: str) -> UnsupportedCheckpoint:
    """The refusal to write for diffusers what it cannot build."""
    return UnsupportedCheckpoint(f"no class of diffusers has {what}: give DST the name of a .safetensors file instead")
