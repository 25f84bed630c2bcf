"""Which family an autoencoder is of, and who says so; weights alone cannot tell SD 1.x from SDXL, or SD3 from FLUX.1.

In this order: the operator's sidecar, the diffusers config or the file's own metadata, the other keys of a full
checkpoint, the sha256 in the known table, the shapes; last, as guesses, the configured default and what was a guess
when the file was written. A file's name decides nothing, it is a hint. Reads no tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from app.errors import UnsupportedCheckpoint
from app.store.declared import Declared, FamilySource
from app.vae.architectures import architecture_of
from app.vae.autoencoder import Config
from app.vae.families import FAMILIES, Family
from app.vae.latent_format import Constant

CUSTOM = "custom"  # a family that is no row: only its constants are known

PIPELINE_KEYS = (
    ("conditioner.embedders.", "sdxl"),
    ("cond_stage_model.transformer.", "sd1"),
    ("cond_stage_model.model.", "sd2"),
    ("model.diffusion_model.joint_blocks.", "sd3"),
    ("model.diffusion_model.double_blocks.", "flux"),
    ("model.diffusion_model.double_blocks.", "flux2"),
)
"""Keys beside the autoencoder of a full checkpoint: text encoders of the UNet generation, blocks of the others."""

CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl"}  # of cross-attention; 1280 is SDXL's refiner


@dataclass(frozen=True)
class Hints:
    """Everything but the shapes that may tell a family."""

    declared: tuple[Declared, ...] = ()
    pipeline: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes beside it in a full checkpoint
    known_family: str | None = None
    default_family: str | None = None
    stem: str = ""


def candidates(config: Config) -> list[Family]:
    """The rows that these shapes fit, without those that only a name leads to."""
    return [row for row in FAMILIES.values() if not row.by_name and _fits(row, config)]


def family_of(config: Config, hints: Hints) -> tuple[Family, FamilySource]:
    """The family of an autoencoder with this configuration, and who said so.

    Raises UnsupportedCheckpoint when a declaration contradicts the shapes, or when nothing decides.
    """
    rows = candidates(config)
    facts = [item for item in hints.declared if item.source != "default"]
    for item in facts:
        if family := _declared_family(item, config, rows, hints):
            return family, item.source
    if same := [row for row in rows if row.name in _pipeline_families(hints.pipeline)]:
        return _pick(same, hints), "checkpoint"
    if same := [row for row in rows if row.name == hints.known_family]:
        return same[0], "hash"
    if rows and all(replace(row, name="") == replace(rows[0], name="") for row in rows):
        return _pick(rows, hints), "checkpoint"
    default = FAMILIES.get(hints.default_family or "")
    if default is not None and _fits(default, config):
        return default, "default"
    for item in hints.declared:
        if family := _declared_family(item, config, rows, hints):
            return family, "default"
    raise UnsupportedCheckpoint(_undecided(config, rows, hints.stem))


def doubt_of(family: Family, source: FamilySource, stem: str) -> str | None:
    """One line where a family is a guess: what its file's name hints at, and how to settle it; else None."""
    if source != "default":
        return None
    hint = _hinted(stem, [row for row in FAMILIES.values() if _alike(row, family)])
    told = f" (the file's name hints at {hint})" if hint else ""
    return (
        f"the family {family.name} is a guess, nothing in the file tells it{told}: "
        f'{{"family": "{hint or family.name}"}} in a NAME.json beside the file settles it'
    )


def _alike(row: Family, family: Family) -> bool:
    """Whether weights of one may be of the other."""
    return (*_kind(row), row.latent_channels, row.spatial_factor) == (
        *_kind(family),
        family.latent_channels,
        family.spatial_factor,
    )


def _hinted(stem: str, rows: list[Family]) -> str | None:
    """The row whose name a file's name has in it, the longest; a hint and no more."""
    return max((row.name for row in rows if row.name in stem.lower()), key=len, default=None)


def _kind(row: Family) -> tuple[str, bool]:
    return row.architecture, row.latent_format.statistics


def _kind_of(config: Config) -> tuple[str, bool]:
    """Architecture, and whether the weights bring their latents' statistics."""
    return architecture_of(config).name, config.statistics_bytes > 0


def _fits(row: Family, config: Config) -> bool:
    return (
        _kind(row) == _kind_of(config)
        and row.latent_channels == config.latent_channels
        and row.spatial_factor == config.spatial_factor
    )


def _declared_family(item: Declared, config: Config, rows: list[Family], hints: Hints) -> Family | None:
    """The row that is named, the row of these constants, a family of its own for other constants; else None."""
    if item.family is not None:
        row = FAMILIES[item.family]
        if not _fits(row, config):
            raise UnsupportedCheckpoint(
                f"{item.origin} says family {row.name} ({row.architecture}, {row.latent_channels} latent channels at "
                f"1/{row.spatial_factor}); the weights are {_describe(config)}"
            )
        return _sized(_with_constants(row, item.scaling_factor, item.shift_factor), item)
    scale = item.default_scaling_factor if item.scaling_factor is None else item.scaling_factor
    if scale is None:
        return None
    shift = item.shift_factor or 0.0
    if same := [row for row in rows if _with_constants(row, scale, shift) == row]:
        return _pick(same, hints)
    if item.scaling_factor is None:
        return None
    like = rows or [row for row in FAMILIES.values() if _kind(row) == _kind_of(config)]
    row = replace(like[0], name=CUSTOM, latent_channels=config.latent_channels, spatial_factor=config.spatial_factor)
    return _sized(_with_constants(row, scale, shift), item)


def _sized(family: Family, item: Declared) -> Family:
    """The family. Raises UnsupportedCheckpoint for constants of another number of channels than its latents have."""
    form, channels = family.latent_format, family.channels("scaled")
    for key, constant in (("scaling_factor", form.scaling_factor), ("shift_factor", form.shift_factor)):
        if isinstance(constant, tuple) and len(constant) != channels:
            raise UnsupportedCheckpoint(
                f"{item.origin}: {key} has {len(constant)} numbers; latents of these weights have {channels} channels"
            )
    return family


def _with_constants(row: Family, scale: Constant | None, shift: Constant | None) -> Family:
    """The row with these constants; None leaves its own."""
    own = row.latent_format
    return replace(
        row,
        latent_format=replace(
            own,
            scaling_factor=own.scaling_factor if scale is None else scale,
            shift_factor=own.shift_factor if shift is None else shift,
        ),
    )


def _pick(rows: list[Family], hints: Hints) -> Family:
    """One of several rows with the same constants, so nothing can go wrong: SD 1.x and 2.x, TAESD and TAESDXL.

    For the name alone ask the known table, the default, then the file's own name.
    """
    for name in (hints.known_family, hints.default_family):
        for row in rows:
            if row.name == name:
                return row
    named = [row for row in rows if hints.stem.lower().startswith(row.name)]
    return max(named, key=lambda row: len(row.name)) if named else rows[0]


def _pipeline_families(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    found: set[str] = set()
    for key, shape in shapes.items():
        if key.startswith("model.diffusion_model.") and key.endswith(".attn2.to_k.weight") and len(shape) == 2:
            return {CONTEXT_WIDTHS.get(shape[1], "")}  # a text encoder may be missing or another's; this is not
        found.update(name for prefix, name in PIPELINE_KEYS if key.startswith(prefix))
    return found


def _describe(config: Config) -> str:
    return f"{_kind_of(config)[0]}, {config.latent_channels} latent channels at 1/{config.spatial_factor}"


def _undecided(config: Config, rows: list[Family], stem: str) -> str:
    if rows:
        names, hinted = [row.name for row in rows], _hinted(stem, rows)
        told = f", the file's name hints at {hinted}" if hinted else ""
        hint = f'put {{"family": "{hinted or names[0]}"}} (or the other) into a NAME.json beside the file'
        return f"could be {' or '.join(names)}: the weights do not tell{told}; {hint}"
    hint = 'a NAME.json beside the file with {"scaling_factor": ...} makes it usable'
    return f"no known family is {_describe(config)}; {hint}"
