"""Nothing of a run is made on another device than the network's: on torch's meta device such a tensor raises."""

import random
from collections import deque

import pytest
import torch

from app.execution.banded import AnyExecution, Banded, execute
from app.execution.causal import Carry
from app.execution.primitive import Whole
from app.execution.slices import Sliced
from app.store.checkpoint import blank
from app.vae.architectures import ARCHITECTURES
from tests.vae.test_architectures import RANDOM

EXECUTIONS: dict[str, AnyExecution] = {
    "whole": Whole(),
    "strips": Banded("strips", 500),
    "recompute": Banded("recompute", 500),
}
CLIPS = [name for name, row in ARCHITECTURES.items() if row.clips is not None]
H, W = 5, 3  # of the latents


def frames_of(config, op, count):
    factor = config.spatial_factor
    shape = (config.latent_channels, H, W) if op == "decode" else (config.pixel_channels, H * factor, W * factor)
    return torch.empty(count, *shape, device="meta").contiguous(memory_format=torch.channels_last)


def shapes_of(config, op, count):
    factor = config.spatial_factor
    return (count, config.pixel_channels, H * factor, W * factor) if op == "decode" else (count, H, W)


@pytest.mark.parametrize("op", ["decode", "encode"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_pictures(name, execution, op):
    module = blank(RANDOM[name](random.Random(1)))
    assert all(weight.is_meta for weight in module.parameters())
    x = frames_of(module.config, op, 2)
    bands = [band for _, band in execute(EXECUTIONS[execution], getattr(module, op), x)]
    assert all(band.is_meta for band in bands)
    found = (*bands[0].shape[:2], sum(band.shape[2] for band in bands), bands[0].shape[3])
    expected = shapes_of(module.config, op, 2)
    assert found == expected if op == "decode" else (found[0], *found[2:]) == expected


@pytest.mark.parametrize("op", ["decode", "encode"])
@pytest.mark.parametrize("name", CLIPS)
@torch.inference_mode()
def test_clips(name, op):
    clips = ARCHITECTURES[name].clips
    assert clips is not None
    module = blank(clips.configure(RANDOM[name](random.Random(0))))
    carry: Carry = deque()
    for count in (1, 4):
        found = getattr(module, op)(Sliced(carry), frames_of(module.config, op, count))
        assert found.is_meta
        assert all(kept.is_meta for rows in carry for kept in [rows.joined(0, rows.stop)])


def test_a_tensor_of_another_device_raises():
    class Stray(torch.nn.Module):
        def forward(self, run, x):
            return run.conv(x + torch.ones(x.shape[1], 1, 1), torch.nn.Conv2d(4, 4, 1, device="meta"))

    with pytest.raises(RuntimeError, match="device"), torch.inference_mode():
        list(execute(Whole(), Stray(), torch.empty(1, 4, 3, 3, device="meta")))
