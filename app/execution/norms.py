"""The norms that a network may have: global ones need statistics of the whole map, pointwise ones do not."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TINIEST = 1e-12  # of a position's length, as F.normalize has it


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma (+ bias), each position of (B, C, ...) by itself, in float32 and rounded once.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, in the form and by the names that
    Wan has: `gamma` and `bias` are (C, 1, 1).
    """

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same; makes one map."""
        channels = self.gamma.shape[0]
        # Of (B, h, w, C), where channels_last has the numbers of a position side by side.
        out = F.rms_norm(x.movedim(1, -1), (channels,), self.gamma.flatten(), TINIEST**2 / channels).movedim(-1, 1)
        return out if self.bias is None else out.add_(self.bias)


class AffineRMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight + bias over the channels of each position: the same by the names of DC-AE.

    `weight` and `bias` are (C,).
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same; makes one map."""
        out = F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.eps)
        return out.add_(self.bias).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """torch's, also of groups of one value: a map of 1x1 with a channel a group.

    `F.group_norm` takes those for a mistake in training; all that is left of them is the bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


Norm = nn.GroupNorm | RMSNorm | AffineRMSNorm


def global_norm(norm: Norm | None) -> nn.GroupNorm | None:
    """The norm if it needs statistics of the whole map."""
    return norm if isinstance(norm, nn.GroupNorm) else None
