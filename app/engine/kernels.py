"""Knows of which models a device keeps convolution kernels beside the weights.

A matter of the model and of the device's size alone: a request gives the same bits whatever else is loaded.
"""

from dataclasses import dataclass

from app.engine.planning import TORCH_DTYPES
from app.store.checkpoint import Checkpoint
from app.terms import Dtype

SHARE = 0.25
"""Of the bytes that all weights may take, what one model may take with its kernels: else it goes without."""


@dataclass(frozen=True)
class Kernels:
    """What one device prepares."""

    device: str  # cpu | cuda: the latter's libraries choose for themselves
    room: int  # bytes that all weights may take

    def nbytes(self, checkpoint: Checkpoint, dtype: Dtype) -> int:
        """Bytes beside the weights; 0 where none are prepared."""
        if self.device != "cpu" or dtype != "fp32":
            return 0
        nbytes = checkpoint.kernel_bytes
        fits = checkpoint.weight_bytes(TORCH_DTYPES[dtype]) + nbytes <= SHARE * self.room
        return nbytes if fits else 0
