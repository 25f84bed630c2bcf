"""What came of a command's files: one line for people, a JSON object for programs."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.tools.buckets import Size
from app.tools.manifest import Maker
from app.tools.paths import Item, listed


@dataclass
class Tally:
    """Counts as it goes."""

    total: int = 0  # files that were found
    passed_over: Mapping[str, int] = field(default_factory=dict)
    maker: Maker | None = None  # once the model is known
    done: list[Item] = field(default_factory=list)  # written; by several threads
    failed: list[tuple[str, str]] = field(default_factory=list)  # (file, why)
    skipped: int = 0  # as they exist
    sizes: Counter[Size] = field(default_factory=Counter)  # of buckets
    warnings: set[str] = field(default_factory=set)  # that were said
    ended: str | None = None  # why it ended before the last file
    began: float = field(default_factory=time.monotonic)

    @property
    def any(self) -> bool:
        """Whether anything came of anything."""
        return bool(self.done or self.failed or self.skipped)

    def line(self) -> str:
        """For people."""
        more = f"; not read: {listed(self.passed_over)}" if self.passed_over else ""
        return f"{len(self.done)} done, {len(self.failed)} failed, {self.skipped} skipped{more}"

    def json(self) -> str:
        """For programs."""
        seconds = time.monotonic() - self.began
        maker = self.maker
        about = {"model": maker.model, "sha256": maker.sha256, "family": maker.family} if maker else {"model": None}
        content: dict[str, Any] = {
            "op": maker.op if maker else None,
            **about,
            "options": maker.options if maker else {},
            "total": self.total,
            "done": len(self.done),
            "skipped": self.skipped,
            "failed": [{"file": file, "reason": why} for file, why in self.failed],
            "not_read": dict(self.passed_over),
            "buckets": {f"{w}x{h}": count for (w, h), count in sorted(self.sizes.items())},
            "warnings": sorted(self.warnings),
            "ended": self.ended,
            "seconds": round(seconds, 3),
            "files_per_second": round(len(self.done) / seconds, 3) if seconds else None,
        }
        return json.dumps(content, indent=2) + "\n"
