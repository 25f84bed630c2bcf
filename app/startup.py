"""What the log says at the start: what is served with which limits, and what looks like a mistake."""

import logging
from collections.abc import Iterator, Mapping

from app.engine.engine import Engine
from app.settings import PREFIX, Settings, unknown_variables
from app.store.checkpoint import Checkpoint
from app.text import shown

log = logging.getLogger("app.startup")

UNITS = (("GiB", 30), ("MiB", 20), ("KiB", 10))


def report(settings: Settings, engine: Engine, environ: Mapping[str, str]) -> None:
    """Logs one line of what is served, and a warning for each thing that is hardly meant."""
    log.info("%s", served(settings, engine))
    for line in (*unknown_variables(environ), *doubts(settings, engine)):
        log.warning("%s", line)


def served(settings: Settings, engine: Engine) -> str:
    """Folders, models, devices, precision and limits, in one line."""
    entries = engine.store.entries()
    unusable = sum(not isinstance(entry, Checkpoint) for entry in entries)
    models = f"{len(entries)} model{'s' * (len(entries) != 1)}"
    models += f", {unusable} unusable" if unusable else ""
    models += "" if engine.scanned else " so far"
    return "; ".join(
        (
            f"{', '.join(map(shown, settings.models))}: {models}",
            f"device {', '.join(worker.name for worker in engine.workers)}",
            f"precision {settings.precision}",
            f"queue {settings.queue_size} items, {settings.queue_pixels} pixels",
            f"body {size(settings.max_body_bytes)}, picture {settings.max_pixels} pixels",
            f"keys {'on' if settings.keys or settings.api_keys_file else 'off'}",
        )
    )


def doubts(settings: Settings, engine: Engine) -> Iterator[str]:
    """One line for each setting that the folders do not bear out."""
    if settings.default_model is not None and not engine.default_found:
        yield f"{PREFIX}DEFAULT_MODEL={settings.default_model}: no such model{'' if engine.scanned else ' so far'}"
    elif engine.scanned and not any(isinstance(entry, Checkpoint) for entry in engine.store.entries()):
        yield f"no usable model in {', '.join(map(shown, settings.models))}"


def size(count: int) -> str:
    """Bytes in the largest unit that leaves none over."""
    return next((f"{count >> bits}{name}" for name, bits in UNITS if count and not count % (1 << bits)), f"{count}B")
