"""Two autoencoders -> one between them, and the brightness and contrast of what it decodes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from app.errors import FamilyMismatch, UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint
from app.text import shown
from app.tools.convert import Output, cast, new_dtype, places_of, read_places, source_metadata, write_checkpoint
from app.vae.families import Family


@dataclass(frozen=True)
class Blend:
    """How much of B goes into each half, and what happens to the pictures that come out.

    A decoded picture p in [-1, 1] becomes contrast * p + brightness, whatever range the network itself works in.
    """

    encoder_ratio: float = 0.5
    decoder_ratio: float = 0.5
    contrast: float = 1.0
    brightness: float = 0.0


def merge(a: Checkpoint, b: Checkpoint, blend: Blend, output: Output) -> Path:
    """Writes (1 - ratio) * A + ratio * B, computed in float32, in A's layout and dtypes; returns the weights' file.

    BatchNorm statistics of the latents are A's: they say what the diffusion model sees. Raises FamilyMismatch and
    UnsupportedCheckpoint when the two are not of one kind or the result is not finite, and as `convert`.
    """
    _check_alike(a, b)
    ours, theirs = places_of(a), places_of(b)
    row = a.architecture
    dtypes = {name: new_dtype(row, name, place.info.dtype, output.dtype) for name, place in ours.items()}
    adjust = _adjustments(a, blend)

    def tensors(names: Iterable[str]) -> Iterator[Tensor]:
        names = list(names)
        mixed = [name for name in names if not name.startswith(row.statistics)]
        others = read_places(theirs[name] for name in mixed)
        for name, tensor in zip(names, read_places(ours[name] for name in names), strict=True):
            if name.startswith(row.statistics):
                yield tensor
                continue
            ratio = blend.encoder_ratio if name.startswith(row.encoder) else blend.decoder_ratio
            value = torch.lerp(tensor.float(), next(others).float().reshape(tensor.shape), ratio)
            factor, offset = adjust.get(name, (1.0, 0.0))
            value = value * factor + offset
            if not bool(value.isfinite().all()):
                raise UnsupportedCheckpoint(f"{name} is not finite in the result: nothing was written")
            yield cast(name, value, dtypes[name])

    guessed = "default" in (a.family_source, b.family_source)
    a = replace(a, family_source="default") if guessed else a  # of the result, half of which is B
    metadata = source_metadata(a) | {
        "merge_sha256": b.sha256,
        "merge_name": shown(b.name if b.path.is_dir() else b.path.name),
        "encoder_ratio": repr(blend.encoder_ratio),
        "decoder_ratio": repr(blend.decoder_ratio),
        "contrast": repr(blend.contrast),
        "brightness": repr(blend.brightness),
    }
    return write_checkpoint(a, dtypes, tensors, metadata, output, (a, b))


def same_space(a: Family, b: Family) -> bool:
    """Whether latents of one family mean the same to the other: SD 1.x and 2.x share their space and all constants."""
    return a == b or (a.space == b.space != "" and replace(a, name=b.name) == b)


def _check_alike(a: Checkpoint, b: Checkpoint) -> None:
    if not same_space(a.family, b.family):
        names = " and ".join(f"{item.name} is {item.family.name} ({item.family_source})" for item in (a, b))
        raise FamilyMismatch(f"cannot merge, as their latent spaces differ: {names}")
    if a.config == b.config:
        return
    for field in fields(a.config):
        ours, theirs = (getattr(item.config, field.name) for item in (a, b))
        if ours != theirs:
            what = "" if isinstance(ours, tuple) and not isinstance(ours[0], int) else f": {ours} and {theirs}"
            raise FamilyMismatch(f"cannot merge {a.name} and {b.name}: they differ in {field.name}{what}")


def _adjustments(checkpoint: Checkpoint, blend: Blend) -> dict[str, tuple[float, float]]:
    """{canonical name: (factor, offset)} of the output convolution's tensors.

    Its pictures q = middle + half * p have p in [-1, 1]; of contrast * p + brightness they are
    contrast * q + (1 - contrast) * middle + half * brightness.
    """
    if (blend.contrast, blend.brightness) == (1.0, 0.0):
        return {}
    low, high = checkpoint.family.pixel_range
    middle, half = (high + low) / 2, (high - low) / 2
    stem = checkpoint.architecture.output(checkpoint.config)
    if stem is None:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: its decoder does not end in a plain convolution with a bias; "
            "--brightness and --contrast have nothing to act on"
        )
    offset = (1 - blend.contrast) * middle + half * blend.brightness
    return {f"{stem}.weight": (blend.contrast, 0.0), f"{stem}.bias": (blend.contrast, offset)}
