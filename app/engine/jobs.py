"""What is asked of a device: one picture to encode or one latent to decode, and what came of it."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, get_args

import numpy as np

from app.errors import InvalidImage, InvalidLatent
from app.terms import Convention, Dtype, Op, Precision, Tiling

if TYPE_CHECKING:  # at run time they would load torch, which the command line does only when it must
    from app.execution.causal import Carry
    from app.store.checkpoint import Checkpoint

Output = Literal["uint8", "uint16", "float16", "float32"]
"""Of a decoded picture: rounded to 8 or 16 bits, or as the network gives it, black at -1, white at 1, unclamped."""
Numbers = Literal["float16", "float32"]
"""Of what comes out of an encoder."""

Rank = Literal["work", "later", "spare"]
"""Who goes first: `later` and `spare` run in turns where no work waits, and `spare` is dropped as soon as some does."""
RANKS: tuple[Rank, ...] = get_args(Rank)

T = TypeVar("T")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What to do with the arrays of one request; jobs with equal tasks and shapes may share a batch."""

    op: Op
    checkpoint: "Checkpoint"
    latents: Convention = "scaled"
    precision: Precision = "auto"
    tiling: Tiling = "auto"
    deterministic: bool = False
    output: Output = "uint8"  # of a decoded picture
    seed: int | None = None  # encode: draw from the posterior; None takes its mode
    moments: bool = False  # encode: neither, but the posterior itself: raw, mean and log-variance where it has one
    numbers: Numbers = "float16"  # encode: of the result
    rank: Rank = "work"

    @property
    def network(self) -> str:
        """The weights and what network they are: pictures and clips take turns, and each has a speed of its own."""
        sha256 = self.checkpoint.sha256
        return sha256 if self.checkpoint.temporal_factor == 1 else f"{sha256}/clips"


@dataclass(eq=False)
class Clip:
    """What one clip has on a device from its first slice to its last. Belongs to the event loop.

    Between two slices nobody else knows of the carry; a running slice has it for itself. A clip that runs as one slice
    has none.
    """

    carry: "Carry | None" = field(default_factory=deque)
    held: int = 0  # bytes of it, as memory is counted
    dtype: Dtype | None = None  # of the first slice, and so of all
    over: bool = False

    @property
    def begun(self) -> bool:
        """Whether its first slice is done: what it carries cannot be had again."""
        return self.dtype is not None

    def end(self) -> None:
        """Lets go of everything."""
        self.carry, self.held, self.over = deque(), 0, True


@dataclass(frozen=True)
class Result:
    """One finished item and what happened to it."""

    # encode: `Task.numbers`, (C, h, w), of moments (2C, h, w); decode: `Task.output`, (H, W, C). Of a slice of a clip
    # (C, t, h, w) and (T, H, W, C).
    array: np.ndarray
    plan: str  # "fp16/whole"
    reason: str | None  # why the plan was not the first choice
    seconds: dict[str, float]  # queue, load, compute


@dataclass(frozen=True)
class Work(Generic[T]):
    """What a request wants of one checkpoint: arrays of these shapes for each task, and what is done once they may run.

    `do` is called with an `Admission` for each of `parts`.
    """

    parts: Sequence[tuple[Task, Sequence[Shape]]]
    do: Callable[..., Awaitable[T]]


Prepare = Callable[["Checkpoint"], Work[T]]
"""The work of a request on the checkpoint that its model's name means; raises what refuses it."""


@dataclass(eq=False)
class Job:
    """One item on its way: its array, its future and its clock."""

    task: Task
    # encode: uint8 (H, W, C), or float32 in [-1, 1]; decode: float16 or float32 (C, h, w). Of a slice of a clip the
    # frames too: (T, H, W, C), (C, t, h, w).
    array: np.ndarray
    deadline: float | None  # on time.monotonic()
    future: "asyncio.Future[Result]"
    queued: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    origin: str = ""  # who asked, for the log
    clip: Clip | None = None  # that this is the next slice of
    # The worker's own notes: why the item no longer runs as first planned; whether its network overflowed in fp16.
    reason: str | None = None
    overflowed: bool = False

    @property
    def pixels(self) -> int:
        """Pixels of the picture, whichever side of the job it is on."""
        return picture_pixels(self.task, self.array.shape)

    @property
    def key(self) -> Hashable:
        """Jobs of equal keys may share a forward; a deterministic job, or a slice of a clip, shares with nobody."""
        task = self.task
        alone = id(self) if task.deterministic or self.clip else None
        wishes = (task.latents, task.precision, task.tiling, task.output)
        checkpoint = task.checkpoint
        # The same bytes may lie in the folder twice, declared as two families or with other norm groups.
        model = (checkpoint.sha256, checkpoint.family, checkpoint.config)
        return (task.op, model, self.array.shape, self.array.dtype.kind, wishes, alone)

    @property
    def gone(self) -> bool:
        """Nobody waits for the result any more."""
        return self.future.done()

    def late(self, now: float) -> bool:
        """The deadline has passed."""
        return self.deadline is not None and now >= self.deadline


def picture_pixels(task: Task, shape: tuple[int, ...]) -> int:
    """Pixels of the picture side, from the shape of one item's array; of a clip, of as many frames as it may have."""
    if task.op == "encode":
        frames = shape[0] if len(shape) == 4 else 1
        return frames * shape[-3] * shape[-2]
    frames = shape[1] * task.checkpoint.temporal_factor if len(shape) == 4 else 1
    side = task.checkpoint.family.side(task.latents)
    return frames * shape[-2] * shape[-1] * side * side


def check_shape(task: Task, shape: tuple[int, ...]) -> None:
    """Whether one item's array fits the model.

    Raises InvalidImage for a picture (H, W, C) of other channels than the network's or no multiple of the family's,
    InvalidLatent for a latent (C, h, w) of other channels than the convention has. Of clips there are frames, too:
    (T, H, W, C) and (C, T, h, w).
    """
    family = task.checkpoint.family
    if task.op == "encode":
        channels = task.checkpoint.config.pixel_channels
        if len(shape) != (3 if task.checkpoint.temporal_factor == 1 else 4) or shape[-1] != channels:
            raise InvalidImage(f"{task.checkpoint.name} takes pictures (H, W, {channels}), not {tuple(shape)}")
        multiple, (height, width) = family.size_multiple, shape[-3:-1]
        if height % multiple or width % multiple:
            raise InvalidImage(f"{width}x{height} is not a multiple of {multiple} as {family.name} needs it")
        return
    expected = family.channels(task.latents)
    if len(shape) == 4 and task.checkpoint.temporal_factor == 1:
        raise InvalidLatent(f"{task.checkpoint.name} takes latents of pictures here, (C, h, w), not a clip: {shape}")
    if shape[0] != expected:
        raise InvalidLatent(
            f"{task.checkpoint.name} ({family.name}) takes {task.latents} latents of {expected} channels, "
            f"(N, {expected}, h, w); this one has shape {tuple(shape)}{_hint(task, shape[0])}"
        )


def _hint(task: Task, channels: int) -> str:
    other: Convention = "raw" if task.latents == "scaled" else "scaled"
    return f": are they latents={other}?" if channels == task.checkpoint.family.channels(other) else ""
