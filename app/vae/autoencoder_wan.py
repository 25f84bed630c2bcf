"""The VAE of Wan 2.1, which is Qwen-Image's too: a causal network of clips, and for pictures one frame of it.

Every convolution there sees zeros in place of the frames before the first, so of a picture each uses the last of its
three taps in time and is one of two dimensions; the layers between frames (`time_conv`) do not run. `picture_tensors`
takes what is left out of a file. For clips all of it runs, under `execution.slices`: the frames are the batch.
Attribute names are the publisher's keys, but for the attention's.
Reference: Wan team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv:2503.20314.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.norms import RMSNorm
from app.execution.pointwise import Add
from app.execution.primitive import Execution
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.posterior import DiagonalGaussian, Posterior

MULTIPLES = (1, 2, 4, 4)  # of the base width, by level, finest first
DEPTH = 2  # residual blocks of a level of the encoder; the decoder has one more
IN_TIME = (False, True, True)  # by level but the coarsest: whether what lies between it and the next changes the rate
TEMPORAL_FACTOR = 4  # frames per latent but the first
PIXEL_CHANNELS = (3, 4)  # RGB, or with alpha as Qwen-Image-Layered's

BETWEEN_FRAMES = re.compile(
    r"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.(?:(?:down|up)samples\.\d+\.)?time_conv\.(?:weight|bias)"
)
ATTENTION = re.compile(r"((?:encoder|decoder)\.middle\.1\.)(to_qkv|proj)\.(weight|bias)")


@dataclass(frozen=True)
class WanConfig:
    """What the shapes of a checkpoint say."""

    encoder_width: int  # channels of the finest level
    decoder_width: int
    latent_channels: int
    pixel_channels: int = 3
    flat: bool = False  # whether the file has kernels of two dimensions already

    spatial_factor = 1 << (len(MULTIPLES) - 1)
    temporal_factor = 1
    statistics_bytes = 0

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "WanConfig":
        """Reads the configuration off a state dict's shapes, keys as the publisher has them.

        Raises UnsupportedCheckpoint where a key that every such file has is missing, and for pictures that are neither
        RGB nor RGBA.
        """
        encoder, decoder = sides(shapes, "encoder.conv1.weight"), sides(shapes, "decoder.head.2.weight")
        latent = sides(shapes, "decoder.conv1.weight")
        if encoder[1] != decoder[0] or encoder[1] not in PIXEL_CHANNELS:
            raise UnsupportedCheckpoint(
                f"the VAE of Wan for pictures of {encoder[1]} channels in and {decoder[0]} out; 3 or 4 were expected, "
                "the same in both (12 out are those of a decoder that enlarges, which is not run here)"
            )
        return cls(encoder[0], decoder[1], latent[1], encoder[1], flat=len(encoder) == 4)

    def for_clips(self) -> "WanClipConfig":
        """The configuration of the same weights' network for clips.

        Raises UnsupportedCheckpoint for a file of two dimensions.
        """
        if self.flat:
            raise UnsupportedCheckpoint("this VAE of Wan is for pictures alone: its kernels have two dimensions")
        return WanClipConfig(self.encoder_width, self.decoder_width, self.latent_channels, self.pixel_channels)


@dataclass(frozen=True)
class WanClipConfig(WanConfig):
    """Of the network with its layers in time."""

    temporal_factor = TEMPORAL_FACTOR


def sides(shapes: Shapes, key: str) -> tuple[int, ...]:
    """The four or five sides of a convolution's kernel. Raises UnsupportedCheckpoint where it has none."""
    if key not in shapes:
        raise UnsupportedCheckpoint(f"the VAE of Wan has the key {key}; this file has not")
    if len(shapes[key]) not in (4, 5) or 0 in shapes[key]:
        raise UnsupportedCheckpoint(f"{key} has shape {shapes[key]}; a convolution's four or five sides were expected")
    return shapes[key]


def picture_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of our network's that a file's tensor is for a picture: views, none for `time_conv`.

    Of a kernel (O, I, t, h, w) the last tap (O, I, h, w); the rest as `clip_tensors`.
    """
    if BETWEEN_FRAMES.fullmatch(name):
        return
    if tensor.dim() == 5 and tensor.shape[2]:
        tensor = tensor[:, :, -1]
    yield from clip_tensors(name, tensor)


def clip_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of our network's that a file's tensor is for a clip: views.

    Of a kernel with one tap (O, I, 1, h, w) that (O, I, h, w); of a norm's (C, 1, 1, 1) or (C, 1, 1) the latter; of
    the attention's three projections in one, each.
    """
    if tensor.dim() == 5 and tensor.shape[2] == 1:
        tensor = tensor[:, :, 0]
    elif name.endswith(".gamma"):
        tensor = tensor.reshape(-1, 1, 1)
    match = ATTENTION.fullmatch(name)
    if match is None or tensor.dim() == 0:
        yield name, tensor
    elif match[2] == "proj":
        yield f"{match[1]}proj_out.{match[3]}", tensor
    else:
        for part, third in zip("qkv", tensor.tensor_split(3), strict=True):
            yield f"{match[1]}{part}.{match[3]}", third


def clamp(x: Tensor, inplace: bool = False) -> Tensor:
    """What the decoder ends with: [-1, 1]. What is infinite becomes NaN: a picture that overflowed is not to pass."""
    infinite = x.isinf()
    return (x.clamp_(-1, 1) if inplace else x.clamp(-1, 1)).masked_fill_(infinite, math.nan)


def conv3(c_in: int, c_out: int, timed: bool) -> Any:
    """A convolution of 3x3; `timed`, with three taps in time, which `Sliced` alone runs."""
    if timed:
        return nn.Conv3d(c_in, c_out, kernel_size=3, padding=(0, 1, 1))
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


class Residual(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h, w). Numbers are those of a sequence whose activations have no weights."""

    def __init__(self, c_in: int, c_out: int, timed: bool) -> None:
        super().__init__()
        first, second = conv3(c_in, c_out, timed), conv3(c_out, c_out, timed)
        self.residual = nn.ModuleDict({"0": RMSNorm(c_in), "2": first, "3": RMSNorm(c_out), "6": second})
        self.shortcut = nn.Conv2d(c_in, c_out, kernel_size=1) if c_in != c_out else None

    def forward(self, run: Execution[Any], x: Any) -> Any:
        layer: Any = self.residual
        h = run.conv(x, layer["2"], norm=layer["0"], act=F.silu)
        if self.shortcut is not None:
            x = run.conv(x, self.shortcut)
        return run.conv(h, layer["6"], norm=layer["3"], act=F.silu, add=x)


class Attention(nn.Module):
    """(B, c, h, w) -> the same, every position attending to all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.attention(x, self)


class Downsample(nn.Module):
    """(B, c, h, w) -> (B, c, h // 2, w // 2); zeros to the right and below only. In time, of two frames one."""

    def __init__(self, channels: int, timed: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, kernel_size=3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, kernel_size=(3, 1, 1), stride=(2, 1, 1)) if timed else None

    def forward(self, run: Execution[Any], x: Any, add: Any = None) -> Any:
        conv: Any = self.resample["1"]
        if self.time_conv is None:
            return run.conv(x, conv, pad=(0, 1, 0, 1), add=add)
        x = run.between(run.conv(x, conv, pad=(0, 1, 0, 1)), self.time_conv)
        return x if add is None else run.apply(Add(), x, add)


class Upsample(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2h, 2w). In time, of one frame two."""

    def __init__(self, c_in: int, c_out: int, timed: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": conv3(c_in, c_out, timed=False)})
        self.time_conv = nn.Conv3d(c_in, 2 * c_in, kernel_size=(3, 1, 1)) if timed else None

    def forward(self, run: Execution[Any], x: Any, add: Any = None) -> Any:
        conv: Any = self.resample["1"]
        if self.time_conv is not None:
            x = run.between(x, self.time_conv)
        return run.conv(x, conv, up=True, add=add)


def middle(channels: int, timed: bool) -> nn.ModuleList:
    """What a half has at its coarsest."""
    first, last = (Residual(channels, channels, timed) for _ in range(2))
    return nn.ModuleList([first, Attention(channels), last])


def head(c_in: int, c_out: int, timed: bool) -> nn.ModuleDict:
    """A half's last norm and convolution."""
    return nn.ModuleDict({"0": RMSNorm(c_in), "2": conv3(c_in, c_out, timed)})


class Encoder(nn.Module):
    """Pixels (B, C, H, W) in [-1, 1] -> (B, 2z, H / 8, W / 8)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, timed = config.encoder_width, config.temporal_factor > 1
        self.conv1 = conv3(config.pixel_channels, width, timed)
        self.downsamples = nn.ModuleList()
        channels = width
        for level, multiple in enumerate(MULTIPLES):
            for _ in range(DEPTH):
                self.downsamples.append(Residual(channels, width * multiple, timed))
                channels = width * multiple
            if level < len(MULTIPLES) - 1:
                self.downsamples.append(Downsample(channels, timed and IN_TIME[level]))
        self.middle = middle(channels, timed)
        self.head = head(channels, 2 * config.latent_channels, timed)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        x = run.conv(x, self.conv1)
        for layer in (*self.downsamples, *self.middle):
            x = layer(run, x)
        head: Any = self.head
        return run.conv(x, head["2"], norm=head["0"], act=F.silu)


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> pixels (B, C, 8h, 8w) in [-1, 1]."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, timed = config.decoder_width, config.temporal_factor > 1
        channels = width * MULTIPLES[-1]
        self.conv1 = conv3(config.latent_channels, channels, timed)
        self.middle = middle(channels, timed)
        self.upsamples = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(MULTIPLES))):
            for _ in range(DEPTH + 1):
                self.upsamples.append(Residual(channels, width * multiple, timed))
                channels = width * multiple
            if level > 0:
                self.upsamples.append(Upsample(channels, channels // 2, timed and IN_TIME[level - 1]))
                channels //= 2
        self.head = head(channels, config.pixel_channels, timed)

    def forward(self, run: Execution[Any], z: Any) -> Any:
        x = run.conv(z, self.conv1)
        for layer in (*self.middle, *self.upsamples):
            x = layer(run, x)
        head: Any = self.head
        return run.conv(x, head["2"], norm=head["0"], act=F.silu, then=clamp)


class AutoencoderWan(Autoencoder):
    """The two halves, and the 1x1 convolutions between them and the latent."""

    def __init__(self, config: WanConfig) -> None:
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
        """Pixels (B, C, H, W) in [-1, 1] -> moments (B, 2z, H / 8, W / 8): mean and log-variance of raw latents."""
        return run.conv(self.encoder(run, pixels), self.conv1)

    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Raw latents (B, z, h, w) -> pixels (B, C, 8h, 8w) in [-1, 1]."""
        return self.decoder(run, run.conv(latents, self.conv2))
