"""What a file is, as plain values and as the lines of a table: what `latentd inspect` and `latentd models` print."""

from collections.abc import Iterable, Mapping

from app.store.checkpoint import Checkpoint
from app.store.names import Entry
from app.text import one_line, shown
from app.weights.files import open_weights
from app.weights.renames import Layout, layout_of

COLUMNS = ("NAME", "FAMILY", "FROM", "FORMAT", "SHA256", "FP16", "KNOWN AS")


def facts_of(entry: Entry) -> dict[str, object]:
    """Everything that is known about a model, or why it cannot be used.

    Raises UnsupportedCheckpoint when its files are not readable any more.
    """
    if not isinstance(entry, Checkpoint):
        return {"name": entry.name, "path": shown(entry.path), "format": entry.format, "error": entry.error}
    family = entry.family
    return {
        "name": entry.name,
        "path": shown(entry.path),
        "family": family.name,
        "family_source": entry.family_source,
        "format": entry.format,
        "layout": file_layout(entry),
        "dtype": entry.weight_dtype,
        "parameters": entry.parameters,
        "sha256": entry.sha256,
        "tensors_sha256": entry.tensors_sha256,
        "known_as": entry.known_as,
        "copy_of": entry.copy_of,
        "fp16": entry.fp16,
        "baked": entry.baked,
        "latent_channels": family.latent_channels,
        "spatial_factor": family.spatial_factor,
        "scaling_factor": family.latent_format.scaling_factor,
        "shift_factor": family.latent_format.shift_factor,
    }


def file_layout(checkpoint: Checkpoint) -> Layout:
    """The layout of a checkpoint's keys; of a pair, `ldm` only where both halves have it."""
    layouts = {layout_of(open_weights(path).tensors, path.stem) for path in checkpoint.files}
    return "ldm" if layouts == {"ldm"} else "diffusers"


def table(entries: Iterable[Entry]) -> list[str]:
    """One line each, under a line of headings, in columns."""
    rows = [COLUMNS, *(tuple(map(one_line, _row(entry))) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def lines(facts: Mapping[str, object]) -> list[str]:
    """One line a fact; what is not known or does not apply is a dash."""
    width = max(map(len, facts))
    return [f"{key.ljust(width)}  {_cell(value)}" for key, value in facts.items()]


def _row(entry: Entry) -> tuple[str, ...]:
    if not isinstance(entry, Checkpoint):
        return (entry.name, "-", "-", entry.format or "-", "-", "-", f"ERROR: {entry.error}")
    family, source = entry.family.name, entry.family_source
    told = [entry.known_as] if entry.known_as else []
    told += [f"(a copy of {entry.copy_of})"] if entry.copy_of else []
    return (entry.name, family, source, entry.format, entry.sha256[:10], entry.fp16, " ".join(told))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value in ((), []) else one_line(str(value))
