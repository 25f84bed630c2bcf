"""A model as plain values: the columns that the list of the service and those of the command line share."""

from app.store.checkpoint import Checkpoint
from app.store.names import Entry
from app.text import shown


def row_of(entry: Entry) -> dict[str, object]:
    """What a model's file was found to be, or why it cannot be used."""
    row: dict[str, object] = {"name": entry.name, "path": shown(entry.path), "format": entry.format}
    if not isinstance(entry, Checkpoint):
        return row | {"error": entry.error}
    family = entry.family
    return row | {
        "family": family.name,
        "family_source": entry.family_source,
        "sha256": entry.sha256,
        "known_as": entry.known_as,
        "copy_of": entry.copy_of,
        "fp16": entry.fp16,
        "parameters": entry.parameters,
        "latent_channels": family.latent_channels,
        "spatial_factor": family.spatial_factor,
        "pixel_channels": entry.config.pixel_channels,
        "scaling_factor": family.latent_format.scaling_factor,
        "shift_factor": family.latent_format.shift_factor,
    }
