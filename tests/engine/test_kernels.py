"""Which models have kernels, and what an engine does with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engine.jobs import Task
from app.engine.kernels import SHARE, Kernels
from app.execution.winograd import KERNELS
from app.store.checkpoint import kernel_bytes
from app.vae.autoencoder_kl import KLConfig
from tests.fakes import checkpoint, latent, load, running, submit

WIDE = KLConfig((128, 128), (128, 128), 1, 1, 4, norm_groups=8)
MODEL = replace(checkpoint("wide", WIDE), kernel_bytes=kernel_bytes(WIDE))
WEIGHTS = MODEL.weight_bytes(torch.float32)
ENOUGH = int((WEIGHTS + MODEL.kernel_bytes) / SHARE) + 1


def test_the_size_of_the_device_decides_not_the_moment():
    assert Kernels("cpu", ENOUGH).nbytes(MODEL, "fp32") == MODEL.kernel_bytes > 0
    assert Kernels("cpu", ENOUGH - 8).nbytes(MODEL, "fp32") == 0
    assert Kernels("cpu", ENOUGH).nbytes(MODEL, "bf16") == 0
    assert Kernels("cuda", ENOUGH).nbytes(MODEL, "fp32") == 0


@pytest.mark.parametrize("room", [ENOUGH, ENOUGH - 8])
@pytest.mark.parametrize("tiling", ["auto", "always"])
async def test_a_resident_has_them_counts_them_and_gives_the_same_picture(room, tiling):
    has = room == ENOUGH
    modules = []

    def loaded(*args):
        modules.append(load(*args))
        return modules[-1]

    task = Task("decode", MODEL, tiling=tiling, output="float32")
    async with running(MODEL, load=loaded, cache_bytes=room) as engine:
        (found,) = await submit(engine, task, latent(24))
        (resident,) = engine.workers[0].cache.residents()
    assert resident.nbytes == WEIGHTS + (MODEL.kernel_bytes if has else 0)
    (module,) = modules
    made = [buffer for name, buffer in module.named_buffers() if name.endswith(KERNELS)]
    assert sum(buffer.nbytes for buffer in made) == (MODEL.kernel_bytes if has else 0)
    async with running(MODEL, load=load, cache_bytes=ENOUGH - 8) as engine:
        (plain,) = await submit(engine, task, latent(24))
    assert np.abs(found.array - plain.array).max() <= 2e-5 * np.ptp(plain.array)
    assert (found.array != plain.array).any() == has


async def test_what_a_deterministic_request_may_take_is_beside_weights_and_kernels():
    capacity = 10 * ENOUGH
    async with running(MODEL, memory_limit_bytes=capacity) as engine:
        planner = engine.workers[0].planner
        found = planner.available(Task("decode", MODEL, deterministic=True))
        assert planner.shape_of(Task("decode", MODEL), (4, 8, 8)).kernels
    assert found == capacity - WEIGHTS - MODEL.kernel_bytes
