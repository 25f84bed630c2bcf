"""Finds out what a source of weights is: headers and shapes first, its bytes' hash last, no tensor at all."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from app.errors import UnsupportedCheckpoint
from app.store.checkpoint import Checkpoint, blank, kernel_bytes, some, told_of
from app.store.declared import Declared, from_config, from_metadata, from_sidecar, norm_groups
from app.store.digests import Digest
from app.store.family import Hints, family_of
from app.store.folder import DIFFUSERS_WEIGHTS, Source
from app.store.known import Known, lookup
from app.store.tree import Stamp
from app.text import short
from app.vae.architectures import Architecture
from app.vae.autoencoder import Config
from app.vae.unsupported import no_vae
from app.weights.files import TensorInfo, WeightFile, dtype_name, open_weights
from app.weights.parts import parted
from app.weights.renames import DROPPED, HALVES, NUMBERED, PREFIXES, canonical_keys, half_of, prefix_of

MOST_TENSORS = 4096  # of an autoencoder: SDXL's has 248
LARGEST = 1 << 28  # values of one tensor: SDXL's largest has 2 359 296
WIDEST = 1 << 20  # channels: keeps what the network makes of them within what torch can count


def identify_source(
    source: Source,
    stamps: tuple[Stamp | None, ...],
    default_family: str | None,
    digest: Callable[[tuple[WeightFile, ...]], Digest],
    twin: Callable[[str], Known | None] = lambda tensors: None,
    said: Declared | None = None,
) -> Checkpoint:
    """Finds out what a source is, from headers and shapes; `digest` is asked last, as it reads every byte.

    `stamps` are those of its watched files, taken before; it is named after its stem.
    `twin` is asked for the known file that has the same tensors, where these bytes are not known themselves. `said` is
    believed before all that the files declare.
    Raises UnsupportedCheckpoint with the reason.
    """
    whole = tuple(item for item in stamps if item is not None)
    if len(whole) < len(stamps):
        raise UnsupportedCheckpoint(f"{source.watched[stamps.index(None)].name} cannot be read")
    weights = _weights(source)
    declared = (*((said,) if said else ()), *_declarations(source, weights.metadata))
    config = _config(weights, declared)
    _check_not_zero(weights)
    hashed = digest(weights.files)
    row = lookup(hashed.sha256, hashed.halves) or twin(hashed.tensors)
    family, family_source = family_of(
        config,
        Hints(
            declared=declared,
            pipeline=weights.pipeline or (_beside(source) if row is None else {}),
            known_family=row.family if row else None,
            default_family=default_family,
            stem=source.stem,
        ),
    )
    values = {key: info for key, info in weights.tensors.items() if not key.startswith(weights.row.statistics)}
    dtypes = {dtype_name(info.dtype) for info in values.values()}
    return Checkpoint(
        name=source.stem,
        path=source.path,
        files=source.files,
        sha256=hashed.sha256,
        tensors_sha256=hashed.tensors,
        format=source.format,
        family=family,
        family_source=family_source,
        config=config,
        known_as=row.name if row else None,
        fp16=row.fp16 if row else "unknown",
        parameters=sum(
            math.prod(shape)
            for key, shape in _resident(weights.row, weights.shapes).items()
            if not key.startswith(weights.row.statistics)
        ),
        kernel_bytes=kernel_bytes(config),
        weight_dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        baked=bool(weights.pipeline),
        stamps=whole,
    )


@dataclass(frozen=True)
class _Weights:
    """The autoencoder's tensors by canonical name, and what lies beside them in the files."""

    row: Architecture
    files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorInfo]
    pipeline: Mapping[str, tuple[int, ...]]  # shapes of a full checkpoint's other tensors
    metadata: Mapping[str, str]
    others: Mapping[str, str]  # what is there in place of a dense tensor, by canonical name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def _weights(source: Source) -> _Weights:
    if not source.files:
        sharded = any(source.path.glob("*-of-*")) or any(source.path.glob("*.index.json"))
        raise UnsupportedCheckpoint(
            "its weights are split over several files; one file was expected"
            if sharded
            else f"a config.json without weights: expected {DIFFUSERS_WEIGHTS[0]} beside it"
        )
    tensors: dict[str, TensorInfo] = {}
    pipeline: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    others: dict[str, str] = {}
    files = tuple(open_weights(path) for path in source.files)
    row = told_of(files)
    for header in (parted(each, row) for each in files):
        names = canonical_keys(header.tensors, row, header.path.stem)
        others |= _others(header, row, header.path.stem)
        metadata.update(header.metadata)
        for key, name in names.items():
            if name in tensors:
                raise UnsupportedCheckpoint(f"{name} is there twice")
            tensors[name] = header.tensors[key]
        if prefix := prefix_of(header.tensors):
            own = (prefix, *DROPPED)
            pipeline |= {key: info.shape for key, info in header.tensors.items() if not key.startswith(own)}
    _check_halves(source, tensors, {key: info.shape for file in files for key, info in file.tensors.items()})
    return _Weights(row, files, tensors, pipeline, metadata, others)


def _others(header: WeightFile, row: Architecture, stem: str) -> dict[str, str]:
    """What has the place of a tensor, by the canonical name that the tensor would have."""
    keys = [key for key in header.others if half_of(stem) or not NUMBERED.match(key)]  # lists of a trainer, too
    names = canonical_keys([*header.tensors, *keys], row, stem)
    return {names[key]: header.others[key] for key in keys if key in names}


def _beside(source: Source) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the full checkpoint NAME that a NAME.vae.* belongs to; none where it says nothing."""
    if source.owner is None:
        return {}
    try:
        header = open_weights(source.owner)
    except UnsupportedCheckpoint:
        return {}
    own = (*PREFIXES, *DROPPED)
    return {key: info.shape for key, info in header.tensors.items() if not key.startswith(own)}


def _check_halves(source: Source, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UnsupportedCheckpoint unless canonical `names` are of two halves; `shapes` are by the files' own keys."""
    names = list(names)
    there = [half for half in HALVES if any(name.startswith(f"{half}.") for name in names)]
    if not there:
        kind = no_vae(shapes)
        why = f"this is {kind}" if kind else "no key begins with encoder. or decoder."
        raise UnsupportedCheckpoint(f"no VAE inside: {why} ({some(names) or 'no tensors'})")
    if len(there) == 1:
        other = next(half for half in HALVES if half not in there)
        stem = source.stem.removesuffix(f"_{there[0]}")
        raise UnsupportedCheckpoint(f"only the {there[0]}: {stem}_{other}.* is missing beside it")


def _declarations(source: Source, metadata: Mapping[str, str]) -> tuple[Declared, ...]:
    sidecar = from_sidecar(source.sidecar) if source.sidecar else None
    config = from_config(source.config) if source.config else None
    return tuple(item for item in (sidecar, config, from_metadata(metadata)) if item is not None)


def _config(weights: _Weights, declared: tuple[Declared, ...]) -> Config:
    """The configuration that the shapes say, once the strict load is sure to succeed with it."""
    shapes = weights.shapes
    _check_size(shapes)
    row = weights.row
    config = row.configure(shapes, norm_groups(declared))
    wanted = {key: tuple(value.shape) for key, value in blank(config).state_dict().items()}
    there = _resident(row, shapes)
    if missing := [key for key in wanted if key not in there and key not in row.counters]:
        if wrong := next((key for key in missing if key in weights.others), None):
            raise UnsupportedCheckpoint(f"{wrong} is {weights.others[wrong]}; a dense tensor was expected")
        raise UnsupportedCheckpoint(f"missing {some(missing)}")
    if left := [key for key in there if key not in wanted]:
        raise UnsupportedCheckpoint(f"left over {some(left)}")
    for key, shape in wanted.items():
        if key in there and there[key] != shape:
            raise UnsupportedCheckpoint(f"{key} has shape {there[key]}; expected {shape}")
    for name, info in weights.tensors.items():
        if name not in row.counters and not info.dtype.is_floating_point:
            raise UnsupportedCheckpoint(f"{name} is {dtype_name(info.dtype)}; expected floating point")
    return config


def _check_not_zero(weights: _Weights) -> None:
    """Raises UnsupportedCheckpoint for a file that was published with zeros in place of a layer."""
    for file in weights.files:
        names = canonical_keys(file.tensors, weights.row, file.path.stem)
        for key, tensor in file.read([key for key in names if names[key] in weights.row.never_zero]):
            if not tensor.any():
                raise UnsupportedCheckpoint(f"{key} is all zero, and so is whatever passes it: the file is damaged")


def _resident(row: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the network's tensors that canonical ones of the files are."""
    empty = ((name, torch.empty(row.shape(name, shape), device="meta")) for name, shape in shapes.items())
    return {key: tuple(part.shape) for name, tensor in empty for key, part in row.resident(name, tensor)}


def _check_size(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UnsupportedCheckpoint for what only a hostile file has: a network of its shapes would fill the memory."""
    if len(shapes) > MOST_TENSORS:
        raise UnsupportedCheckpoint(f"refused: {len(shapes)} tensors; an autoencoder has at most {MOST_TENSORS}")
    for key, shape in shapes.items():
        if math.prod(shape) > LARGEST or max(shape, default=0) > WIDEST:
            raise UnsupportedCheckpoint(f"refused: {short(key)} of shape {shape} is too large for an autoencoder")
