"""What is asked of `latentd encode` and `decode`, and how much of it may be on its way at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.engine.devices import device_names, torch_device
from app.settings import Settings
from app.tools.pictures import Wish

BATCHES = 2
"""So many batches of pixels are in flight: one is computed while another gathers."""

CPU_PIXELS = 1 << 18
"""In flight where this process computes on a CPU, whose caches hold no more: 64 pictures of 256 x 256 took 10.2 s of
its time in one batch, 9.3 s in batches of 16 and 7.0 s in batches of 4 or one by one (latentd-small, two cores)."""

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
    most = min(BATCHES * settings.batch_pixels, settings.queue_pixels)
    here = errand.url is None and all(torch_device(name).type == "cpu" for name in device_names(settings.devices))
    return min(most, CPU_PIXELS) if here else most
