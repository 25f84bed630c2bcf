"""The VAE of Wan 2.2 (5B) and that of Qwen-Image 2.1, for pictures: Wan 2.1's blocks, in levels with shortcuts.

As there, one frame of a causal network, whose layers between frames do not run. The shortcuts have no weights, but say
what the first frame of a clip gets: one frame that is nothing stands before it. Attribute names are the publisher's.
Reference: Wan team, arXiv:2503.20314; Chen et al., "Deep Compression Autoencoder", arXiv:2410.10733 (the shortcuts).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.pointwise import Add, Pointwise, Shape, ToChannels, ToSpace
from app.execution.primitive import Execution
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.autoencoder_wan import (
    DEPTH,
    PIXEL_CHANNELS,
    Downsample,
    Residual,
    Upsample,
    clamp,
    conv3,
    head,
    middle,
    picture_tensors,
    sides,
)
from app.vae.posterior import DiagonalGaussian, Posterior

PATCH = 2  # pixels along one side that Wan 2.2 has as channels
PATCHED = ("encoder.conv1.weight", "decoder.head.2.weight", "decoder.head.2.bias")


@dataclass(frozen=True)
class Wan22Config:
    """What the shapes of a checkpoint say."""

    encoder_width: int  # channels of the finest level
    decoder_width: int
    latent_channels: int
    pixel_channels: int = 3

    multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 4)  # of the width, finest level first
    patch: ClassVar[int] = PATCH
    statistics_bytes = 0

    @property
    def levels(self) -> int:
        """Of a half; all but the coarsest halve the sides."""
        return len(self.multiples)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return self.patch << (self.levels - 1)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> Self:
        """Reads the configuration off a state dict's shapes, keys as the publisher has them.

        Raises UnsupportedCheckpoint where a key that every such file has is missing, and for pictures that are neither
        RGB nor RGBA.
        """
        encoder, decoder = sides(shapes, "encoder.conv1.weight"), sides(shapes, "decoder.head.2.weight")
        latent = sides(shapes, "decoder.conv1.weight")
        each = cls.patch**2
        if encoder[1] != decoder[0] or encoder[1] not in [channels * each for channels in PIXEL_CHANNELS]:
            raise UnsupportedCheckpoint(
                f"the VAE of Wan 2.2 or Qwen-Image 2.1 for {encoder[1]} channels in and {decoder[0]} out; "
                f"3 or 4 for each of {each} pixels were expected, the same in both"
            )
        return cls(encoder[0], decoder[1], latent[1], encoder[1] // each)


@dataclass(frozen=True)
class QwenImage21Config(Wan22Config):
    """The same of Qwen-Image 2.1: a level more in place of the patches, and RGBA."""

    multiples = (1, 2, 4, 8, 8)
    patch = 1


def patched_picture_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`picture_tensors`, a patch's channels in torch's order: by row, then by column. The publisher's is the other."""
    for key, part in picture_tensors(name, tensor):
        dim = 1 if key == PATCHED[0] else 0
        turned = key in PATCHED and part.dim() > dim and part.shape[dim] % PATCH**2 == 0
        split = (part.shape[dim] // PATCH**2, PATCH, PATCH) if turned else ()
        yield key, part.unflatten(dim, split).transpose(dim + 1, dim + 2).flatten(dim, dim + 2) if turned else part


@dataclass(frozen=True)
class AverageDown(Pointwise):
    """The mean of each block of 2x2 positions: (B, C, h, w) -> (B, C, h / 2, w / 2).

    With `frames`, of the first frame and the nothing before it: (B, 2 C, ...), in turn that of nothing and its own.
    """

    frames: bool
    reduces = 2

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        if h % 2 or w % 2:
            raise ValueError(f"a map of {h}x{w} has no blocks of 2x2")
        return b, 2 * c if self.frames else c, h // 2, w // 2

    def __call__(self, *sources: Tensor) -> Tensor:
        mean = F.avg_pool2d(sources[0], 2)
        if not self.frames:
            return mean
        b, c, h, w = mean.shape
        out = mean.new_zeros((b, h, w, c, 2))
        out[..., 1] = mean.permute(0, 2, 3, 1)
        return out.flatten(3).permute(0, 3, 1, 2)

    def scratch(self, source: int) -> int:
        return source // 4 if self.frames else 0


@dataclass(frozen=True)
class DuplicateUp(Pointwise):
    """Positions to blocks of 2x2, in C / `reduction` channels: (B, C, h, w) -> (B, C / reduction, 2h, 2w).

    With a reduction, pairs of channels are the rows of a block; with `frames` as well, they are the frame that is
    nothing and the first.
    """

    reduction: int  # 1 or 2
    frames: bool
    enlarges = 2

    def shape(self, *sources: Shape) -> Shape:
        ((b, c, h, w),) = sources
        return b, c // self.reduction, 2 * h, 2 * w

    def __call__(self, *sources: Tensor) -> Tensor:
        x = sources[0].permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        out = x.new_empty((b, h, 2, w, 2, c // self.reduction))
        for row in range(2):
            channel = 0 if self.reduction == 1 else 1 if self.frames else row
            out[:, :, row] = x[..., channel :: self.reduction].unsqueeze(3)
        return out.reshape(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


class Down(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h / 2, w / 2); the last level keeps its size."""

    def __init__(self, c_in: int, c_out: int, frames: bool, last: bool) -> None:
        super().__init__()
        widths = [c_in, *[c_out] * DEPTH]
        blocks: list[nn.Module] = [Residual(*pair) for pair in pairwise(widths)]
        self.downsamples = nn.ModuleList(blocks if last else [*blocks, Downsample(c_out)])
        self.average = None if last else AverageDown(frames)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        shortcut = x if self.average is None else run.apply(self.average, x)
        *blocks, end = self.downsamples
        for block in blocks:
            x = block(run, x)
        return run.apply(Add(), end(run, x), shortcut) if self.average is None else end(run, x, add=shortcut)


class Up(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2h, 2w); the last level keeps its size, and has no shortcut."""

    def __init__(self, c_in: int, c_out: int, frames: bool, last: bool) -> None:
        super().__init__()
        widths = [c_in, *[c_out] * (DEPTH + 1)]
        blocks: list[nn.Module] = [Residual(*pair) for pair in pairwise(widths)]
        self.upsamples = nn.ModuleList(blocks if last else [*blocks, Upsample(c_out, c_out)])
        self.duplicate = None if last else DuplicateUp(c_in // c_out, frames)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        start = x
        *blocks, end = self.upsamples
        for block in blocks:
            x = block(run, x)
        return end(run, x) if self.duplicate is None else end(run, x, add=run.apply(self.duplicate, start))


class Encoder(nn.Module):
    """Pixels (B, C, H, W) in [-1, 1] -> (B, 2z, H / f, W / f)."""

    def __init__(self, config: Wan22Config) -> None:
        super().__init__()
        multiples = config.multiples
        widths = [config.encoder_width * multiple for multiple in (1, *multiples)]
        last = config.levels - 1
        self.patch = ToChannels() if config.patch > 1 else None
        self.conv1 = conv3(config.pixel_channels * config.patch**2, widths[0])
        self.downsamples = nn.ModuleList(
            Down(widths[level], widths[level + 1], frames=level > 0, last=level == last)
            for level in range(config.levels)
        )
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.latent_channels)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        x = run.conv(x if self.patch is None else run.apply(self.patch, x), self.conv1)
        for layer in (*self.downsamples, *self.middle):
            x = layer(run, x)
        head: Any = self.head
        return run.conv(x, head["2"], norm=head["0"], act=F.silu)


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> pixels (B, C, f h, f w) in [-1, 1]."""

    def __init__(self, config: Wan22Config) -> None:
        super().__init__()
        multiples = config.multiples[::-1]
        widths = [config.decoder_width * multiple for multiple in (multiples[0], *multiples)]
        last = config.levels - 1
        self.conv1 = conv3(config.latent_channels, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.ModuleList(
            Up(widths[level], widths[level + 1], frames=level < last - 1, last=level == last)
            for level in range(config.levels)
        )
        self.head = head(widths[-1], config.pixel_channels * config.patch**2)
        self.patch = ToSpace() if config.patch > 1 else None

    def forward(self, run: Execution[Any], z: Any) -> Any:
        x = run.conv(z, self.conv1)
        for layer in (*self.middle, *self.upsamples):
            x = layer(run, x)
        head: Any = self.head
        x = run.conv(x, head["2"], norm=head["0"], act=F.silu, then=clamp)
        return x if self.patch is None else run.apply(self.patch, x)


class AutoencoderWan22(Autoencoder):
    """The two halves, and the 1x1 convolutions between them and the latent."""

    def __init__(self, config: Wan22Config) -> None:
        super().__init__()
        z = config.latent_channels
        self.config = config
        self.bn = None
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv2d(2 * z, 2 * z, kernel_size=1)
        self.conv2 = nn.Conv2d(z, z, kernel_size=1)
        self.decoder = Decoder(config)

    def posterior(self, moments: Tensor) -> Posterior:
        """What `encode` gave, as a distribution over raw latents."""
        return DiagonalGaussian(moments)

    def encode(self, run: Execution[Any], pixels: Any) -> Any:
        """Pixels (B, C, H, W) in [-1, 1] -> moments (B, 2z, H / f, W / f): mean and log-variance of raw latents."""
        return run.conv(self.encoder(run, pixels), self.conv1)

    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Raw latents (B, z, h, w) -> pixels (B, C, f h, f w) in [-1, 1]."""
        return self.decoder(run, run.conv(latents, self.conv2))
