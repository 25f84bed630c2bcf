"""What a file is, as plain values and as the lines of a table: what `latentd inspect` and `latentd models` print."""

from collections.abc import Iterable, Mapping
from typing import Any

from app.store.checkpoint import Checkpoint
from app.store.names import Entry
from app.store.row import row_of
from app.text import one_line
from app.weights.files import open_weights
from app.weights.renames import Layout, layout_of

FACTS = (
    *("name", "path", "family", "family_source", "format", "layout", "dtype", "parameters", "sha256"),
    *("tensors_sha256", "known_as", "copy_of", "fp16", "baked", "latent_channels", "spatial_factor"),
    *("pixel_channels", "scaling_factor", "shift_factor"),
)
COLUMNS = ("NAME", "FAMILY", "FROM", "FORMAT", "SHA256", "FP16", "KNOWN AS")


def facts_of(entry: Entry) -> dict[str, object]:
    """Everything that is known about a model, or why it cannot be used.

    Raises UnsupportedCheckpoint when its files are not readable any more.
    """
    row = row_of(entry)
    if not isinstance(entry, Checkpoint):
        return row
    row |= {
        "layout": file_layout(entry),
        "dtype": entry.weight_dtype,
        "tensors_sha256": entry.tensors_sha256,
        "baked": entry.baked,
    }
    return {name: row[name] for name in FACTS}


def file_layout(checkpoint: Checkpoint) -> Layout:
    """The layout of a checkpoint's keys; of a pair, `ldm` only where both halves have it."""
    layouts = {layout_of(open_weights(path).tensors, checkpoint.architecture, path.stem) for path in checkpoint.files}
    return "ldm" if layouts == {"ldm"} else "diffusers"


def table(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each row of `GET /models`, under a line of headings, in columns."""
    rows = [COLUMNS, *(tuple(map(one_line, _row(model))) for model in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def lines(facts: Mapping[str, object]) -> list[str]:
    """One line a fact; what is not known or does not apply is a dash."""
    width = max(map(len, facts))
    return [f"{key.ljust(width)}  {_cell(value)}" for key, value in facts.items()]


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    if model.get("error") is not None:
        return (model["name"], "-", "-", model["format"] or "-", "-", "-", f"ERROR: {model['error']}")
    told = [model["known_as"]] if model["known_as"] else []
    told += [f"(a copy of {model['copy_of']})"] if model["copy_of"] else []
    columns = (model[name] for name in ("name", "family", "family_source", "format"))
    return (*columns, model["sha256"][:10], model["fp16"], " ".join(told))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value in ((), []) else one_line(str(value))
