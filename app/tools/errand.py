"""What is asked of `latentd encode` and `decode`, and how much of it may be on its way at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.engine.batcher import QueueLimits
from app.engine.devices import device_names, torch_device
from app.settings import Settings
from app.tools.pictures import Wish

BATCHES = 2
"""So many batches of pixels are in flight: one is computed while another gathers."""

Existing = Literal["refuse", "skip", "replace"]
"""What becomes of targets that are there."""


@dataclass(frozen=True)
class Errand:
    """What is asked of encode or decode."""

    op: str
    query: dict[str, Any]
    existing: Existing
    url: str | None
    key: str | None
    settings: Settings
    wish: Wish = field(default_factory=Wish)
    workers: int | None = None  # threads; None: one for each processor, 4 to 16
    summary: Path | None = None


def pixels_at_once(errand: Errand) -> int:
    """That may be in flight."""
    settings = errand.settings
    limits = QueueLimits(settings.queue_size, settings.queue_pixels, settings.batch_pixels)
    here = errand.url is None and all(torch_device(name).type == "cpu" for name in device_names(settings.devices))
    return min(BATCHES * limits.batch_on("cpu" if here else "cuda"), limits.pixels)
