"""Knows which layers have kernels for Winograd's convolution, and makes these once, when a network is loaded.

They are a buffer of their layer, so that they go where it goes; no state dict has them.
"""

from collections.abc import Iterable

import torch

from app.execution.primitive import plain
from app.execution.program import Conv, Program
from app.execution.winograd import KERNELS, transformed

CHANNELS = 128  # at least, on both sides


def prepare(programs: Iterable[Program]) -> int:
    """Gives the layers of one network that have a use for kernels theirs; the bytes of all of them."""
    layers = {
        node.op.conv: None
        for program in programs
        for node in program.nodes
        if isinstance(node.op, Conv) and _gains(node.op)
    }
    for conv in layers:
        conv.register_buffer(KERNELS, transformed(conv.weight), persistent=False)
    return sum(conv.get_buffer(KERNELS).nbytes for conv in layers)


def _gains(op: Conv) -> bool:
    conv = op.conv
    wide = min(conv.in_channels, conv.out_channels) >= CHANNELS
    return wide and op.up == 1 and plain(conv, op.pad) and conv.weight.dtype == torch.float32
