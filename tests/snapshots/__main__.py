"""Writes what is kept of the surface anew: python -m tests.snapshots."""

from tests.snapshots.surface import NAMES, current, write

for name in NAMES:
    write(name, current(name))
