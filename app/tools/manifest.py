"""What made the files of an output folder: a hidden file of JSON lines in it, written as they are.

A line is either a maker under its id, or a file and its maker's id. Lines are only ever added, each in one write, so
that a process that is killed, or two at a time, leave no more than a torn last line; the last line for a file counts.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NAME = ".latentd-manifest.jsonl"


@dataclass(frozen=True)
class Maker:
    """A model and what was asked of it."""

    op: str
    model: str
    sha256: str
    family: str
    family_source: str
    options: dict[str, Any] = field(default_factory=dict)  # those that were given, `model` aside

    @property
    def id(self) -> str:
        """The same for the same weights, family and options, whatever they are called."""
        content = [self.op, self.sha256, self.family, sorted(self.options.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in sorted(self.options.items()))
        return f"{self.model} ({self.family}, sha256 {self.sha256[:10]}{options})"


@dataclass(frozen=True)
class Made:
    """What is known of one file."""

    maker: Maker
    size: str | None = None  # WxH of the picture that was encoded


class Manifest:
    """The manifest of one folder, which need not be there: read once, then added to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._makers: dict[str, Maker] = {}
        self._files: dict[str, tuple[str, str | None]] = {}
        self._torn = False  # the last line has no end
        self._read()

    def made(self, file: str) -> Made | None:
        """What made a file, by its path in the folder; None where nothing says it."""
        maker, size = self._files.get(file, ("", None))
        return Made(self._makers[maker], size) if maker in self._makers else None

    def note(self, file: str, maker: Maker, size: str | None, more: Mapping[str, Any] | None = None) -> None:
        """Adds that a file was made, and what is more to know of it. Raises OSError."""
        lines: list[dict[str, Any]] = []
        if maker.id not in self._makers:
            self._makers[maker.id] = maker
            lines.append({"id": maker.id, "maker": asdict(maker)})
        lines.append({"file": file, "id": maker.id} | ({"size": size} if size else {}) | dict(more or {}))
        self._files[file] = (maker.id, size)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, ("\n" * self._torn + text).encode())
        finally:
            os.close(handle)
        self._torn = False

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except OSError:
            return  # nothing was made here yet
        self._torn = not content.endswith(b"\n")
        for text in content.splitlines():
            try:
                self._take(json.loads(text))
            except (ValueError, TypeError, RecursionError):  # torn, or not ours
                continue

    def _take(self, line: Any) -> None:
        match line:
            case {"id": str(key), "maker": dict(maker)}:
                self._makers[key] = Maker(**maker)
            case {"file": str(file), "id": str(key), "size": str(size)}:
                self._files[file] = (key, size)
            case {"file": str(file), "id": str(key)}:
                self._files[file] = (key, None)
