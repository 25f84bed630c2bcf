"""A checkpoint: one autoencoder on disk, identified; and how it becomes a module.

Knows files and tensors; which device and precision is the caller's to say.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from app.errors import InvalidParameter, UnsupportedCheckpoint
from app.store.declared import FamilySource
from app.store.family import doubt_of
from app.store.tree import Stamp, stamp
from app.terms import Fp16
from app.text import short
from app.vae.architectures import Architecture, architecture_of, told
from app.vae.autoencoder import Autoencoder, Config
from app.vae.families import Family
from app.vae.kernels import add_kernels
from app.vae.unsupported import unsupported
from app.weights.files import Format, WeightFile, open_weights
from app.weights.parts import parted
from app.weights.renames import canonical_keys, inner_shapes

NAMED = 3  # keys that an error lists


class CheckpointChanged(UnsupportedCheckpoint):
    """The files are not those that were identified: rescan the folder and try again."""


@dataclass(frozen=True)
class Statistics:
    """What scaled latents are normalised by, packed channel by packed channel: (z - mean) / sqrt(variance + eps)."""

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    eps: float
    patch: int  # positions along one side of a raw latent that are channels of a packed one


@dataclass(frozen=True)
class Checkpoint:
    """One autoencoder on disk: what it is, where it is, and how its files looked when that was found out."""

    name: str
    path: Path  # the file, the encoder of a pair, or the diffusers folder
    files: tuple[Path, ...]  # with weights: one, or encoder and decoder
    sha256: str  # over the bytes of `files`, in that order
    tensors_sha256: str  # over the tensors, see `digests.digest_of`: the same for a converted copy
    format: Format
    family: Family
    family_source: FamilySource
    config: Config = field(repr=False)
    known_as: str | None  # its name in the table of published files
    fp16: Fp16  # before any run
    parameters: int  # of the network that runs; a file may have more
    weight_dtype: str  # `fp16`, `bf16`, `fp32`, ...; `mixed`
    baked: bool  # inside a full checkpoint
    stamps: tuple[Stamp, ...] = field(repr=False)
    kernel_bytes: int = 0  # of what may be kept beside the weights in float32
    copy_of: str | None = None  # the name of the model in the same folder whose weights these are

    @cached_property
    def doubt(self) -> str | None:
        """One line where its family is a guess, else None."""
        return doubt_of(self.family, self.family_source, self.path.stem)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the loaded module in this dtype."""
        return self.parameters * dtype.itemsize + self.config.statistics_bytes

    @property
    def architecture(self) -> Architecture:
        """The row of the network."""
        return architecture_of(self.config)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame of a clip but the first, which is one; 1 where it is taken for pictures."""
        return self.architecture.temporal_factor

    def for_clips(self) -> "Checkpoint":
        """The same weights, taken for the network of clips that they are of.

        Raises InvalidParameter for those of pictures alone.
        """
        clips = self.architecture.clips
        if clips is None:
            raise InvalidParameter(f"{self.name} ({self.family.name}) is for pictures; clips are taken by Wan's VAE")
        config = clips.configure(self.config)
        parameters = sum(value.numel() for value in blank(config).parameters())
        return replace(self, config=config, parameters=parameters, kernel_bytes=kernel_bytes(config))

    def changed(self) -> bool:
        """Whether a file was written, replaced or removed since it was identified."""
        try:
            return any(stamp(item.path) != item for item in self.stamps)
        except OSError:
            return True


def load_autoencoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """The module on the device in dtype (BatchNorm statistics in float32), channels_last, for inference only.

    Every tensor is a copy of its own, made one by one: nothing of the module depends on the file afterwards.
    Raises CheckpointChanged when the files are not those that were identified, UnsupportedCheckpoint when they
    cannot be read.
    """
    _check_unchanged(checkpoint)
    row = checkpoint.architecture
    module = blank(checkpoint.config)
    wanted = module.state_dict()
    state: dict[str, Tensor] = {}
    try:
        for name, tensor in read_state(checkpoint):
            shaped = tensor.reshape(row.shape(name, tuple(tensor.shape)))
            for key, part in row.resident(name, shaped):
                if key not in wanted or part.shape != wanted[key].shape:
                    raise UnsupportedCheckpoint(f"unexpected {key} of shape {tuple(part.shape)}")
                kept = key.startswith(row.statistics)
                state[key] = _copy(part, wanted[key].dtype if kept else dtype, device)
    except UnsupportedCheckpoint as error:
        _check_unchanged(checkpoint)  # the likelier reason
        raise UnsupportedCheckpoint(f"{checkpoint.name}: {error}") from error
    _check_unchanged(checkpoint)
    for counter in row.counters & wanted.keys():
        state.setdefault(counter, torch.zeros((), dtype=torch.int64, device=device))
    if missing := [key for key in wanted if key not in state]:
        raise UnsupportedCheckpoint(f"{checkpoint.name}: missing {some(missing)}")
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def read_state(checkpoint: Checkpoint, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor on the host as the file has it) one at a time; copy, do not keep.

    `prefixes` of canonical names are those that are wanted. Raises UnsupportedCheckpoint when a file cannot be read.
    """
    for path in checkpoint.files:
        file = parted(open_weights(path), checkpoint.architecture)
        names = canonical_keys(file.tensors, checkpoint.architecture, path.stem)
        for key, tensor in file.read(key for key in names if names[key].startswith(prefixes)):
            yield names[key], tensor


def read_statistics(checkpoint: Checkpoint) -> Statistics | None:
    """The latents' statistics that the weights bring, None for weights without; no other tensor is read. Blocking.

    Raises as `load_autoencoder`, and UnsupportedCheckpoint for numbers that are not finite.
    """
    if not checkpoint.config.statistics_bytes:
        return None
    _check_unchanged(checkpoint)
    norm = blank(checkpoint.config).bn
    assert norm is not None
    found = {key: value.double() for key, value in read_state(checkpoint, checkpoint.architecture.statistics)}
    mean, variance = found["bn.running_mean"], found["bn.running_var"]
    if not (mean.isfinite().all() and variance.isfinite().all()):
        raise UnsupportedCheckpoint(f"{checkpoint.name}: the statistics of its latents are not finite")
    patch = checkpoint.family.latent_format.patch
    return Statistics(tuple(mean.tolist()), tuple(variance.tolist()), norm.eps, patch)


def told_of(files: Iterable[WeightFile]) -> Architecture:
    """The row of the autoencoder in these files.

    Raises UnsupportedCheckpoint for one that is known and has no network here, and for impossible names.
    """
    shapes = inner_shapes(({key: info.shape for key, info in file.tensors.items()}, file.path.stem) for file in files)
    if name := unsupported(shapes):
        raise UnsupportedCheckpoint(f"this is {name}, which is not supported")
    return told(shapes)


def blank(config: Config) -> Autoencoder:
    """The module on the meta device: shapes without memory."""
    with torch.device("meta"):
        return architecture_of(config).module(config)


@lru_cache(256)
def kernel_bytes(config: Config) -> int:
    """Bytes of the convolution kernels that a network of this configuration has a use for in float32."""
    return add_kernels(blank(config))


def _copy(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of its own memory."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=dtype, device=device, memory_format=layout).copy_(tensor)


def _check_unchanged(checkpoint: Checkpoint) -> None:
    if checkpoint.changed():
        raise CheckpointChanged(f"{checkpoint.name}: {checkpoint.path.name} has changed since it was identified")


def some(keys: Sequence[str]) -> str:
    """The first few keys, for an error."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(map(short, keys[:NAMED])) + more
