"""The latent conventions: `raw` is what the network emits, `scaled` is what a diffusion model sees."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LatentFormat:
    """scaled = (raw - shift_factor) * scaling_factor, with FLUX.2's packing and normalisation where a family has them.

    With `patch` p, scaled latents are (B, C * p * p, h / p, w / p). With `statistics`, the packed channels are
    normalised by the checkpoint's own BatchNorm running statistics, which the caller passes as `norm`.
    """

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    patch: int = 1
    statistics: bool = False

    def scale(self, raw: Tensor, norm: nn.BatchNorm2d | None = None) -> Tensor:
        """Raw (B, C, h, w) -> scaled."""
        z = F.pixel_unshuffle(raw, self.patch) if self.patch > 1 else raw
        if norm is not None:
            mean, std = _statistics(norm, z)
            z = (z - mean) / std
        return (z - self.shift_factor) * self.scaling_factor

    def unscale(self, scaled: Tensor, norm: nn.BatchNorm2d | None = None) -> Tensor:
        """Scaled -> raw (B, C, h, w)."""
        z = scaled / self.scaling_factor + self.shift_factor
        if norm is not None:
            mean, std = _statistics(norm, z)
            z = z * std + mean
        return F.pixel_shuffle(z, self.patch) if self.patch > 1 else z


def _statistics(norm: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("the BatchNorm keeps no running statistics")
    return mean.to(like).view(1, -1, 1, 1), (var.float() + norm.eps).sqrt().to(like).view(1, -1, 1, 1)
