"""Stand-ins for what tests of the engine do not want to be real: checkpoints without files, small networks, a folder
that is a dictionary, and forwards that fail on purpose.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from app.engine import compute
from app.engine.batcher import QueueLimits
from app.engine.engine import Engine, EngineOptions
from app.engine.gauges import gauges
from app.engine.jobs import Job, Result, Task
from app.metrics import Metrics, StateCollector
from app.store.checkpoint import Checkpoint
from app.store.store import Look, ModelStore
from app.vae.autoencoder import Autoencoder
from app.vae.autoencoder_kl import AutoencoderKL, KLConfig
from app.vae.families import FAMILIES

SMALL = KLConfig((8, 16), (8, 16), 1, 1, 4, norm_groups=4)  # spatial factor 2
FAMILY = replace(FAMILIES["sd1"], name="toy", spatial_factor=2)
LIMITS = QueueLimits(items=256, pixels=1 << 26, batch_pixels=1 << 20)


def checkpoint(name: str = "toy", config: KLConfig = SMALL) -> Checkpoint:
    """A checkpoint that no file stands behind; its hash follows from its name."""
    return Checkpoint(
        name=name,
        path=Path(f"{name}.safetensors"),
        files=(Path(f"{name}.safetensors"),),
        sha256=name.encode().hex().ljust(64, "0"),
        tensors_sha256=name.encode().hex().ljust(64, "0"),
        format="safetensors",
        family=FAMILY,
        family_source="operator",
        config=config,
        known_as=None,
        fp16="unknown",
        parameters=sum(p.numel() for p in AutoencoderKL(config).parameters()),
        weight_dtype="fp32",
        baked=False,
        stamps=(),
    )


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """Random weights, the same for every call with the same checkpoint; "loud" ones overflow in half precision."""
    torch.manual_seed(int(checkpoint.sha256[:8], 16))
    assert isinstance(checkpoint.config, KLConfig)
    module = AutoencoderKL(checkpoint.config).requires_grad_(False)
    if checkpoint.name.startswith("loud"):
        module.decoder.conv_in.weight *= 1e6
        module.encoder.conv_in.weight *= 1e6
    return module.to(device, dtype).to(memory_format=torch.channels_last).eval()


class Shelf:
    """A models folder without files."""

    def __init__(self, *checkpoints: Checkpoint) -> None:
        self._checkpoints = list(checkpoints)

    def look(self) -> Look:
        """Nothing changes."""
        return Look({}, settling=False)

    def close(self) -> None:
        """Nothing is being read."""

    def lists(self, checkpoint: Checkpoint) -> bool:
        return checkpoint in self._checkpoints

    def entries(self) -> list[Checkpoint]:
        return self._checkpoints

    def resolve(self, model: str | None, default: str | None) -> Checkpoint:
        return next(each for each in self._checkpoints if each.name == (model or default))


@asynccontextmanager
async def running(
    *checkpoints: Checkpoint, load: Callable[..., Autoencoder] = load, limits: QueueLimits = LIMITS, **options: Any
) -> AsyncIterator[Engine]:
    """A started engine on CPU devices."""
    metrics = Metrics(CollectorRegistry())
    chosen = EngineOptions(**{"devices": ("cpu",), "limits": limits, **options})
    engine = Engine(chosen, cast(ModelStore, Shelf(*checkpoints)), metrics, load)
    metrics.registry.register(cast(Any, StateCollector(partial(gauges, engine))))
    async with engine:
        yield engine


async def submit(engine: Engine, task: Task, *arrays: np.ndarray, deadline: float | None = None) -> list[Result]:
    """One request with these arrays."""
    async with engine.admit(task, [array.shape for array in arrays], deadline) as admission:
        return await admission.run(arrays)


async def submit_all(engine: Engine, task: Task, arrays: Sequence[np.ndarray]) -> list[Any]:
    """One request an array, all at once: a Result or an exception each."""
    answers = await asyncio.gather(*(submit(engine, task, array) for array in arrays), return_exceptions=True)
    return [answer if isinstance(answer, BaseException) else answer[0] for answer in answers]


def latent(side: int = 8, seed: int = 0) -> np.ndarray:
    """(4, side, side) in float16."""
    return np.random.default_rng(seed).standard_normal((4, side, side)).astype(np.float16)


def picture(side: int = 16, seed: int = 0) -> np.ndarray:
    """(side, side, 3) in bytes."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def value(engine: Engine, name: str, **labels: str) -> float:
    """The sum of a metric over all that have these labels; 0 if it was never touched."""
    return total(engine.metrics.registry, name, **labels)


def total(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """As `value`, of any registry."""
    samples = (sample for family in registry.collect() for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


class Forwards:
    """Stands before `compute.forward`: a log of its calls, a gate before them, and whatever a test wants to happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, int]] = []  # (model, plan, items)
        self.threads: list[str] = []  # named after their devices
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.before: Callable[[list[torch.Tensor], Any], None] = lambda inputs, plan: None
        self._run = compute.forward
        monkeypatch.setattr(compute, "forward", self)

    def __call__(self, module: Any, inputs: list[torch.Tensor], tasks: list[Task], plan: Any, check: Any) -> Any:
        self.log.append((tasks[0].checkpoint.name, str(plan), len(inputs)))
        self.threads.append(threading.current_thread().name.partition("-")[0])
        self.entered.set()
        assert self.gate.wait(60)
        self.before(inputs, plan)
        return self._run(module, inputs, tasks, plan, check)

    @property
    def plans(self) -> list[str]:
        """What ran, in order."""
        return [plan for _, plan, _ in self.log]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the device thread at the entrance of its forward."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


async def until(true: Callable[[], bool]) -> None:
    """Waits for what threads bring about."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110  a thread tells nobody
            await asyncio.sleep(0.002)


def job(task: Task, array: np.ndarray, deadline: float | None = None) -> Job:
    """A job of the running loop."""
    return Job(task, array, deadline, asyncio.get_running_loop().create_future())
