"""What is written about an autoencoder beside its weights: the operator's sidecar, a diffusers config, metadata."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeGuard

from app.errors import UnsupportedCheckpoint
from app.store.folder import read_json
from app.text import short
from app.vae.architectures import diffusers_classes
from app.vae.families import FAMILIES
from app.vae.latent_format import Constant

FamilySource = Literal["config", "checkpoint", "hash", "operator", "default"]
"""Who says it; `default` is a guess: nothing but the setting does, or did when the file was written."""

KEYS = ("family", "norm_num_groups", "scaling_factor", "shift_factor")
MOST_CHANNELS = 4096  # of a latent: keeps a hostile list short
MOST_LIST = 1 << 17  # characters of one in a file's metadata
LEAST, LIMIT = 1e-6, 1e6  # of a scale; of a shift the greatest alone. Beyond, float32 has no room for latents


@dataclass(frozen=True)
class Declared:
    """What a sidecar, a diffusers config or a file's metadata says; None where it says nothing."""

    source: FamilySource  # `default`: what was a guess when it was written down
    origin: str  # for messages: the file's name, or "metadata"
    family: str | None = None
    norm_num_groups: int | None = None
    scaling_factor: Constant | None = None
    shift_factor: Constant | None = None
    default_scaling_factor: Constant | None = None  # of the diffusers class; believed only where it leads to a row


def from_sidecar(path: Path) -> Declared | None:
    """The operator's word; None for a JSON file that has none of our keys, as other programs write them.

    Raises UnsupportedCheckpoint for keys or values that are not understood.
    """
    content = _read(path)
    if not any(key in content for key in KEYS):
        return None
    if unknown := [key for key in content if key not in KEYS]:
        raise UnsupportedCheckpoint(f"{path.name}: unknown key {unknown[0]!r}; expected {', '.join(KEYS)}")
    if "shift_factor" in content and not {"family", "scaling_factor"} & content.keys():
        raise UnsupportedCheckpoint(f"{path.name}: shift_factor needs a scaling_factor or a family beside it")
    return _declared(content, "operator", path.name)


def from_config(path: Path) -> Declared:
    """A diffusers config.json. Raises UnsupportedCheckpoint for autoencoders that are built differently."""
    content = _read(path)
    name = str(content.get("_class_name"))
    classes = diffusers_classes()
    if name not in classes:
        raise UnsupportedCheckpoint(f"{path.name}: _class_name is {short(name)}; expected one of {', '.join(classes)}")
    architecture, default = classes[name]
    act = architecture.diffusers.act_fn
    if act is not None and content.get("act_fn", act) != act:
        raise UnsupportedCheckpoint(f"{path.name}: act_fn is {short(str(content['act_fn']))}; expected {act}")
    for key, value in architecture.diffusers.expects.items():
        said = content.get(key, value)
        if said != value and not (isinstance(said, list) and all(each == value for each in said)):
            raise UnsupportedCheckpoint(f"{path.name}: {key} is {short(str(said))}; expected {value}")
    content |= _normalised(content, path.name)
    if "_family" in content:
        content["family"] = content.pop("_family")  # as `latentd convert` writes it: diffusers skips the underscore
    if not _is_family(content.get("family")):
        content.pop("family", None)  # not a key of diffusers: ours, or somebody else's
    return replace(
        _declared(content, _source(content.get("_family_source")), path.name), default_scaling_factor=default
    )


def from_metadata(metadata: Mapping[str, str]) -> Declared:
    """A safetensors file's own metadata, as `models/train_latentd_small.py` and `latentd convert` write it."""
    content = {key: _number(metadata[key]) for key in KEYS if key in metadata}
    if not _is_family(content.pop("family", None)):
        # other programs may use these words for things of their own
        content = {key: value for key, value in content.items() if not isinstance(value, str)}
    else:
        content["family"] = metadata["family"]
    return _declared(content, _source(metadata.get("family_source")), "metadata")


def norm_groups(declared: Iterable[Declared]) -> int | None:
    """The group count of the norms, which no shape tells, where it is declared."""
    return next((item.norm_num_groups for item in declared if item.norm_num_groups is not None), None)


def _source(said: object) -> FamilySource:
    """Of a family that `latentd convert` or `merge` wrote down: a guess stays one, all else is the file's word."""
    return "default" if said == "default" else "config"


def _declared(content: Mapping[str, object], source: FamilySource, origin: str) -> Declared:
    family = content.get("family")
    if family is not None and not _is_family(family):
        raise UnsupportedCheckpoint(f"{origin}: unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    groups = content.get("norm_num_groups")
    if groups is not None and (type(groups) is not int or groups < 1):  # a bool is an int
        raise UnsupportedCheckpoint(f"{origin}: norm_num_groups is {groups!r}; expected a positive integer")
    scale, shift = (_constant(content.get(key), key, origin) for key in ("scaling_factor", "shift_factor"))
    if any(abs(each) < LEAST for each in _each(scale)):
        raise UnsupportedCheckpoint(f"{origin}: scaling_factor is {_shown(scale)}; expected at least {LEAST:g}")
    return Declared(source, origin, None if family is None else str(family), groups, scale, shift)


def _normalised(content: Mapping[str, object], origin: str) -> dict[str, object]:
    """The mean and the standard deviation of each channel, where a diffusers config has them, in our words."""
    if content.get("latents_mean") is None and content.get("latents_std") is None:
        return {}
    mean, std = (_constant(content.get(key), key, origin) for key in ("latents_mean", "latents_std"))
    if not (isinstance(mean, tuple) and isinstance(std, tuple) and len(mean) == len(std)):
        raise UnsupportedCheckpoint(f"{origin}: latents_mean and latents_std are lists of one length; one is not there")
    if any(abs(each) < 1 / LIMIT for each in std):
        raise UnsupportedCheckpoint(f"{origin}: latents_std is {_shown(std)}; expected at least {1 / LIMIT:g}")
    return {"scaling_factor": [1 / each for each in std], "shift_factor": list(mean)}


def _constant(value: object, key: str, origin: str) -> Constant | None:
    """A number, or a list of one for each channel."""
    if value is None:
        return None
    if isinstance(value, list) and 0 < len(value) <= MOST_CHANNELS and all(map(_sound, value)):
        return tuple(map(float, value))
    if _sound(value):
        return float(value)
    raise UnsupportedCheckpoint(f"{origin}: {key} is {short(repr(value))}; expected a number, or one for each channel")


def _sound(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LIMIT  # not NaN either


def _each(constant: Constant | None) -> tuple[float, ...]:
    return constant if isinstance(constant, tuple) else () if constant is None else (constant,)


def _shown(constant: Constant | None) -> str:
    return short(", ".join(f"{each:g}" for each in _each(constant)))


def _is_family(value: object) -> bool:
    return isinstance(value, str) and value in FAMILIES


def _number(text: str) -> object:
    try:
        if text.startswith("["):
            return json.loads(text[:MOST_LIST])
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except (ValueError, RecursionError):
        return text  # refused with its value by _declared


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except OSError as error:
        raise UnsupportedCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnsupportedCheckpoint(str(error)) from error
