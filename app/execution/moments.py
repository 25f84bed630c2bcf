"""Knows the mean and variance of a feature map that is seen band by band, and applies GroupNorm from them.

Bands are merged by the parallel-variance formula (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm
for Computing Sample Variances", 1979) in float32: a mean far from zero costs no digits, as E[x^2] - E[x]^2 would.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.execution.norms import Norm, global_norm

Prepare = Callable[[Tensor, Tensor], object]
"""Writes what becomes of rows of a map: (rows (B, C, n, w), where to)."""


class Moments:
    """Per item and channel: how many values, their mean, and the sum of their squared distances from it."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.empty(0)  # (B, C)
        self._m2 = torch.empty(0)  # (B, C)

    def add(self, band: Tensor) -> None:
        """Takes in a band (B, C, rows, W), contiguous in channels_last."""
        count = band.shape[2] * band.shape[3]
        mean, var = _mean_var(band)
        total = self._count + count
        if self._count == 0:
            self._mean, self._m2 = mean, var.mul_(count)
        else:
            distance = mean - self._mean
            self._mean = self._mean.lerp(mean, count / total)
            self._m2 = self._m2.add(var, alpha=count).addcmul_(distance, distance, value=self._count * count / total)
        self._count = total

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """`norm` of the map as x * scale + shift, both (B, C) in float32."""
        b, c = self._mean.shape
        mean, m2 = (part.view(b, norm.num_groups, -1) for part in (self._mean, self._m2))
        group_mean = mean.mean(dim=2, keepdim=True)
        var = (m2 / self._count + (mean - group_mean).square_()).mean(dim=2, keepdim=True)
        scale = (var + norm.eps).rsqrt_().expand_as(mean).reshape(b, c)
        if norm.affine:
            scale = scale * norm.weight.float()
        shift = -group_mean.expand_as(mean).reshape(b, c) * scale
        return scale, shift + norm.bias.float() if norm.affine else shift


def _mean_var(band: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per item and channel, (B, C) in float32."""
    if band.device.type not in ("cpu", "cuda"):
        var, mean = torch.var_mean(band.float(), dim=(2, 3), correction=0)
        return mean, var
    # torch.var_mean is 40 times slower on channels_last in a CPU's cache. Running statistics in float32, which a
    # momentum of 0 leaves alone, make this kernel answer in float32 for half-precision bands.
    zeros = torch.zeros(band.shape[1], device=band.device)
    ones = torch.ones_like(zeros)
    items = [torch.ops.aten.batch_norm_update_stats(item, zeros, ones, 0.0) for item in band.split(1)]
    return torch.stack([mean for mean, _ in items]), torch.stack([var for _, var in items])


def normalise(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = x * scale + shift, computed in float32 and rounded once; `out` may be a slice of a larger tensor."""
    if x.device.type != "cpu":
        torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None], out=out)
        return
    # A CPU's addcmul would convert half-precision operands in passes of their own; batch_norm's kernel does not.
    unused = torch.empty(0)
    mean, var = torch.zeros_like(scale[0]), torch.ones_like(scale[0])
    for item, item_scale, item_shift, item_out in zip(x.split(1), scale, shift, out.split(1), strict=True):
        torch.ops.aten.native_batch_norm.out(
            item, item_scale, item_shift, mean, var, False, 0.0, 0.0,
            out=item_out, save_mean=unused, save_invstd=unused,
        )  # fmt: skip


def prepare(norm: Norm | None, moments: Moments | None) -> Prepare:
    """What applies the norm, if any, to rows of a map; a global one needs the whole map's moments."""
    if norm is None:
        return lambda x, out: out.copy_(x)
    if (grouped := global_norm(norm)) is None:
        return lambda x, out: out.copy_(norm(x))
    assert moments is not None
    scale, shift = moments.scale_and_shift(grouped)
    return lambda x, out: normalise(x, scale, shift, out)
