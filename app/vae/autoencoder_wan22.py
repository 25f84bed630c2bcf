"""The VAE of Wan 2.2 (5B) and that of Qwen-Image 2.1: Wan 2.1's blocks, in levels with shortcuts.

As there, a picture is one frame of a causal network, whose layers between frames do not run; Wan 2.2 has clips, too.
The shortcuts have no weights, but say what the first frame of a clip gets: one frame that is nothing stands before it.
Attribute names are the publisher's.
Reference: Wan team, arXiv:2503.20314; Chen et al., "Deep Compression Autoencoder", arXiv:2410.10733 (the shortcuts).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.pointwise import Add, Pointwise, Shape, ToChannels, ToSpace
from app.execution.primitive import Execution
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.autoencoder_wan import (
    DEPTH,
    PIXEL_CHANNELS,
    TEMPORAL_FACTOR,
    Downsample,
    Residual,
    Upsample,
    clamp,
    clip_tensors,
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
    flat: bool = False  # whether the file's kernels have one tap in time, or none at all

    multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 4)  # of the width, finest level first
    patch: ClassVar[int] = PATCH
    temporal_factor = 1
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
        flat = len(encoder) == 4 or encoder[2] == 1
        return cls(encoder[0], decoder[1], latent[1], encoder[1] // each, flat=flat)

    def for_clips(self) -> "Wan22ClipConfig":
        """The configuration of the same weights' network for clips.

        Raises UnsupportedCheckpoint for a file of two dimensions.
        """
        if self.flat:
            raise UnsupportedCheckpoint("this VAE of Wan 2.2 is for pictures alone: its kernels have two dimensions")
        return Wan22ClipConfig(self.encoder_width, self.decoder_width, self.latent_channels, self.pixel_channels)


@dataclass(frozen=True)
class Wan22ClipConfig(Wan22Config):
    """Of the network with its layers in time."""

    temporal_factor = TEMPORAL_FACTOR


@dataclass(frozen=True)
class QwenImage21Config(Wan22Config):
    """The same of Qwen-Image 2.1: a level more in place of the patches, and RGBA."""

    multiples = (1, 2, 4, 8, 8)
    patch = 1


def patched_picture_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`picture_tensors`, a patch's channels in torch's order: by row, then by column. The publisher's is the other."""
    yield from _turned(picture_tensors(name, tensor))


def patched_clip_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same of `clip_tensors`."""
    yield from _turned(clip_tensors(name, tensor))


def _turned(parts: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for key, part in parts:
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
class AverageFrames(Pointwise):
    """The mean of each block of 2x2 positions, of two frames of a clip in turn: (T, C, h, w) -> (T / 2, 2 C, ...).

    Before the `first` frame stands one that is nothing.
    """

    first: bool = True
    reduces = 2

    def shape(self, *sources: Shape) -> Shape:
        ((t, _, _, _),) = sources
        if (t + self.first) % 2:
            raise ValueError(f"{t} frames are no pairs")
        _, c, h, w = AverageDown(frames=True).shape(*sources)
        return (t + self.first) // 2, c, h, w

    def __call__(self, *sources: Tensor) -> Tensor:
        mean: Tensor = F.avg_pool2d(sources[0], 2)
        if self.first:
            mean = torch.cat((torch.zeros_like(mean[:1]), mean))
        pairs: Tensor = mean.unflatten(0, (-1, 2))  # (T, 2, C, h, w)
        return pairs.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)

    @property
    def later(self) -> Pointwise:
        return AverageFrames(first=False)

    def scratch(self, source: int) -> int:
        return source  # of its means, with those of nothing, at most two copies


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


@dataclass(frozen=True)
class DuplicateFrames(Pointwise):
    """Positions to blocks of 2x2, and each frame to two: (T, C, h, w) -> (2 T, C, 2h, 2w). The `first` stays one."""

    first: bool = True
    enlarges = 2

    def shape(self, *sources: Shape) -> Shape:
        ((t, c, h, w),) = sources
        return 2 * t - self.first, c, 2 * h, 2 * w

    def __call__(self, *sources: Tensor) -> Tensor:
        large: Tensor = DuplicateUp(1, frames=False)(*sources).permute(0, 2, 3, 1)
        return large.repeat_interleave(2, dim=0)[int(self.first) :].permute(0, 3, 1, 2)

    @property
    def later(self) -> Pointwise:
        return DuplicateFrames(first=False)

    def scratch(self, source: int) -> int:
        return 4 * source  # of frames before they are two, and of the first one's twin


class Down(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h / 2, w / 2); the last level keeps its size. Of two `frames` of a clip one."""

    def __init__(self, c_in: int, c_out: int, frames: bool, last: bool, timed: bool) -> None:
        super().__init__()
        widths = [c_in, *[c_out] * DEPTH]
        blocks: list[nn.Module] = [Residual(*pair, timed) for pair in pairwise(widths)]
        self.downsamples = nn.ModuleList(blocks if last else [*blocks, Downsample(c_out, timed and frames)])
        self.average = None if last else AverageFrames() if timed and frames else AverageDown(frames)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        shortcut = x if self.average is None else run.apply(self.average, x)
        *blocks, end = self.downsamples
        for block in blocks:
            x = block(run, x)
        return run.apply(Add(), end(run, x), shortcut) if self.average is None else end(run, x, add=shortcut)


class Up(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2h, 2w); the last level keeps its size, and has no shortcut.

    Of each of the `frames` of a clip two, of as many channels.
    """

    def __init__(self, c_in: int, c_out: int, frames: bool, last: bool, timed: bool) -> None:
        super().__init__()
        widths = [c_in, *[c_out] * (DEPTH + 1)]
        blocks: list[nn.Module] = [Residual(*pair, timed) for pair in pairwise(widths)]
        self.upsamples = nn.ModuleList(blocks if last else [*blocks, Upsample(c_out, c_out, timed and frames)])
        duplicate = DuplicateFrames() if timed and frames else DuplicateUp(c_in // c_out, frames)
        self.duplicate = None if last else duplicate

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
        last, timed = config.levels - 1, config.temporal_factor > 1
        self.patch = ToChannels() if config.patch > 1 else None
        self.conv1 = conv3(config.pixel_channels * config.patch**2, widths[0], timed)
        self.downsamples = nn.ModuleList(
            Down(widths[level], widths[level + 1], frames=level > 0, last=level == last, timed=timed)
            for level in range(config.levels)
        )
        self.middle = middle(widths[-1], timed)
        self.head = head(widths[-1], 2 * config.latent_channels, timed)

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
        last, timed = config.levels - 1, config.temporal_factor > 1
        self.conv1 = conv3(config.latent_channels, widths[0], timed)
        self.middle = middle(widths[0], timed)
        self.upsamples = nn.ModuleList(
            Up(widths[level], widths[level + 1], frames=level < last - 1, last=level == last, timed=timed)
            for level in range(config.levels)
        )
        self.head = head(widths[-1], config.pixel_channels * config.patch**2, timed)
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
