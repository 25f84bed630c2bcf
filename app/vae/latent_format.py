"""The latent conventions: `raw` is what the network emits, `scaled` is what a diffusion model sees."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Constant = float | tuple[float, ...]
"""One number for all channels of a scaled latent, or one each."""


@dataclass(frozen=True)
class LatentFormat:
    """scaled = (raw - shift_factor) * scaling_factor, with FLUX.2's packing and normalisation where a family has them.

    Where a family's constants are a mean and a standard deviation per channel, shift_factor is the mean and
    scaling_factor one by the standard deviation. With `patch` p, scaled latents are (B, C * p * p, h / p, w / p). With
    `statistics`, the packed channels are normalised by the checkpoint's own BatchNorm running statistics, which the
    caller passes as `norm`.
    """

    scaling_factor: Constant = 1.0
    shift_factor: Constant = 0.0
    patch: int = 1
    statistics: bool = False

    def scale(self, raw: Tensor, norm: nn.BatchNorm2d | None = None) -> Tensor:
        """Raw (B, C, h, w) -> scaled."""
        z = F.pixel_unshuffle(raw, self.patch) if self.patch > 1 else raw
        if norm is not None:
            mean, std = _statistics(norm, z)
            z = (z - mean) / std
        return ((z - _over(z, self.shift_factor)) * _over(z, self.scaling_factor)).to(raw.dtype)

    def unscale(self, scaled: Tensor, norm: nn.BatchNorm2d | None = None) -> Tensor:
        """Scaled -> raw (B, C, h, w)."""
        z = (scaled / _over(scaled, self.scaling_factor) + _over(scaled, self.shift_factor)).to(scaled.dtype)
        if norm is not None:
            mean, std = _statistics(norm, z)
            z = z * std + mean
        return F.pixel_shuffle(z, self.patch) if self.patch > 1 else z


def per_channel(mean: Iterable[float], std: Iterable[float]) -> LatentFormat:
    """The format that normalises each channel by its mean and standard deviation."""
    return LatentFormat(tuple(1 / each for each in std), tuple(mean))


def _over(z: Tensor, constant: Constant) -> Tensor | float:
    """A constant as it is applied to z (B, C, ...): numbers per channel in float32, whatever z has."""
    if not isinstance(constant, tuple):
        return constant
    if len(constant) != z.shape[1]:
        raise ValueError(f"constants of {len(constant)} channels for latents of {z.shape[1]}")
    return torch.tensor(constant, device=z.device).view(1, -1, *(1,) * (z.dim() - 2))


def _statistics(norm: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("the BatchNorm keeps no running statistics")
    return mean.to(like).view(1, -1, 1, 1), (var.float() + norm.eps).sqrt().to(like).view(1, -1, 1, 1)
