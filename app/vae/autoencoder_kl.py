"""AutoencoderKL: the VAE of SD 1.x, 2.x, SDXL, SD3, FLUX.1 and FLUX.2, in one file, read top to bottom.

Attribute names are the checkpoint keys of the LDM layout. Knows tensors only: no file, no device, no scale factor.
Reference: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.norms import GroupNorm
from app.execution.primitive import Execution
from app.vae.autoencoder import Autoencoder, Shape, Shapes
from app.vae.posterior import DiagonalGaussian, Posterior

NORM_EPS = 1e-6  # of every GroupNorm of the LDM autoencoders
NORM_GROUPS = 32  # of every published one; no shape tells it
BATCH_NORM_EPS = 1e-4  # diffusers, AutoencoderKLFlux2, batch_norm_eps
PATCH = 2  # latent positions along one side that share a channel of that BatchNorm
BLOCK_TENSORS = 8  # of a residual block at least


@dataclass(frozen=True)
class KLConfig:
    """What the shapes of a checkpoint say, and the one thing they do not: the group count of the norms."""

    encoder_widths: tuple[int, ...]  # channels per level, finest first
    decoder_widths: tuple[int, ...]
    encoder_depth: int  # residual blocks per level
    decoder_depth: int
    latent_channels: int
    quant_conv: bool = True
    post_quant_conv: bool = True
    mid_attention: bool = True
    batch_norm: bool = False  # FLUX.2 keeps its latents' statistics as a BatchNorm over 2x2 patches
    norm_groups: int = NORM_GROUPS

    pixel_channels = 3

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return 1 << (len(self.encoder_widths) - 1)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the BatchNorm: means and variances in float32, and the counter of its training."""
        channels = PATCH**2 * self.latent_channels
        return 2 * channels * torch.float32.itemsize + torch.int64.itemsize if self.batch_norm else 0

    @classmethod
    def from_shapes(cls, shapes: Shapes, norm_groups: int = NORM_GROUPS) -> "KLConfig":
        """Reads the configuration off a state dict's shapes, keys in the LDM layout.

        Raises UnsupportedCheckpoint when a key that every AutoencoderKL has is missing, or when there cannot be
        weights for as many blocks in every level as level 0 has.
        """
        encoder_widths, encoder_depth = levels_of(shapes, "encoder.down")
        decoder_widths, decoder_depth = levels_of(shapes, "decoder.up")
        if len(encoder_widths) != len(decoder_widths):
            raise UnsupportedCheckpoint(
                f"encoder has {len(encoder_widths)} levels, decoder {len(decoder_widths)}: not one autoencoder"
            )
        post = "post_quant_conv.weight" in shapes
        first = "post_quant_conv.weight" if post else "decoder.conv_in.weight"
        latent_channels = shape_of(shapes, first)[1]
        for width in (*encoder_widths, *decoder_widths):
            if width % norm_groups:
                raise UnsupportedCheckpoint(
                    f"{width} channels do not divide into {norm_groups} norm groups: give norm_num_groups in a "
                    "NAME.json or config.json beside the file, or in its metadata"
                )
        blocks = len(encoder_widths) * (encoder_depth + decoder_depth)
        if blocks * BLOCK_TENSORS > len(shapes):
            raise UnsupportedCheckpoint(f"missing tensors: {blocks} residual blocks, but only {len(shapes)} tensors")
        return cls(
            encoder_widths=encoder_widths,
            decoder_widths=decoder_widths,
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            latent_channels=latent_channels,
            quant_conv="quant_conv.weight" in shapes,
            post_quant_conv=post,
            mid_attention="decoder.mid.attn_1.q.weight" in shapes,
            batch_norm="bn.running_mean" in shapes,
            norm_groups=norm_groups,
        )


def shape_of(shapes: Shapes, key: str, of: str = "an AutoencoderKL") -> Shape:
    """The four sides of a convolution's kernel. Raises UnsupportedCheckpoint where there is none."""
    if key not in shapes:
        raise UnsupportedCheckpoint(f"{of} has the key {key}; this file has not")
    if len(shapes[key]) != 4 or 0 in shapes[key]:
        raise UnsupportedCheckpoint(f"{key} has shape {shapes[key]}; a convolution's four sides were expected")
    return shapes[key]


def levels_of(shapes: Shapes, stem: str, of: str = "an AutoencoderKL") -> tuple[tuple[int, ...], int]:
    """(channels of each level, blocks per level) of `encoder.down` or `decoder.up`, in the order of the keys."""
    widths: list[int] = []
    while (key := f"{stem}.{len(widths)}.block.0.conv2.weight") in shapes:
        widths.append(shape_of(shapes, key, of)[0])
    if not widths:
        shape_of(shapes, f"{stem}.0.block.0.conv2.weight", of)
    depth = 1
    while f"{stem}.0.block.{depth}.conv2.weight" in shapes:
        depth += 1
    return tuple(widths), depth


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


def group_norm(channels: int, groups: int = NORM_GROUPS) -> GroupNorm:
    """The norm of every LDM autoencoder."""
    return GroupNorm(groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, kernel_size=1) if c_in != c_out else None

    def forward(self, run: Execution[Any], x: Any) -> Any:
        h = run.conv(x, self.conv1, norm=self.norm1, act=F.silu)
        if self.nin_shortcut is not None:
            x = run.conv(x, self.nin_shortcut)
        return run.conv(h, self.conv2, norm=self.norm2, act=F.silu, add=x)


class AttnBlock(nn.Module):
    """(B, c, h, w) -> the same, every position attending to all."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.attention(x, self)


class Mid(nn.Module):
    """The coarsest level of encoder and decoder: block, attention, block."""

    def __init__(self, channels: int, groups: int = NORM_GROUPS, *, attention: bool = True) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups) if attention else None
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        x = self.block_1(run, x)
        if self.attn_1 is not None:
            x = self.attn_1(run, x)
        return self.block_2(run, x)


class Downsample(nn.Module):
    """(B, c, h, w) -> (B, c, h // 2, w // 2); zeros to the right and below only, as CompVis trained it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.conv(x, self.conv, pad=(0, 1, 0, 1))


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.conv(x, self.conv, up=True)


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next one, where whoever builds it sets one."""

    def __init__(self, c_in: int, c_out: int, depth: int, groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(depth))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, run: Execution[Any], x: Any) -> Any:
        for block in self.block:
            x = block(run, x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(run, x)
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> (B, 2z, H / f, W / f)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths, groups = config.encoder_widths, config.norm_groups
        self.conv_in = conv3(3, widths[0])
        self.down = nn.ModuleList()
        for index, (c_in, c_out) in enumerate(pairwise((widths[0], *widths))):
            level = Level(c_in, c_out, config.encoder_depth, groups)
            if index < len(widths) - 1:
                level.downsample = Downsample(c_out)
            self.down.append(level)
        self.mid = Mid(widths[-1], groups, attention=config.mid_attention)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = conv3(widths[-1], 2 * config.latent_channels)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        x = run.conv(x, self.conv_in)
        for level in self.down:
            x = level(run, x)
        x = self.mid(run, x)
        return run.conv(x, self.conv_out, norm=self.norm_out, act=F.silu)


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1]."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths, groups = config.decoder_widths, config.norm_groups
        self.conv_in = conv3(config.latent_channels, widths[-1])
        self.mid = Mid(widths[-1], groups, attention=config.mid_attention)
        self.up = nn.ModuleList()
        for index, (c_out, c_in) in enumerate(pairwise((*widths, widths[-1]))):
            level = Level(c_in, c_out, config.decoder_depth, groups)
            if index > 0:
                level.upsample = Upsample(c_out)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = conv3(widths[0], 3)

    def forward(self, run: Execution[Any], z: Any) -> Any:
        x = run.conv(z, self.conv_in)
        x = self.mid(run, x)
        for level in reversed(self.up):
            x = level(run, x)
        return run.conv(x, self.conv_out, norm=self.norm_out, act=F.silu)


class AutoencoderKL(Autoencoder):
    """The two halves and the 1x1 convolutions between them and the latent, where the family has them."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        z = config.latent_channels
        self.config: KLConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, kernel_size=1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, kernel_size=1) if config.post_quant_conv else None
        self.bn = nn.BatchNorm2d(PATCH**2 * z, eps=BATCH_NORM_EPS, affine=False) if config.batch_norm else None

    def posterior(self, moments: Tensor) -> Posterior:
        """What `encode` gave, as a distribution over raw latents."""
        return DiagonalGaussian(moments)

    def encode(self, run: Execution[Any], pixels: Any) -> Any:
        """Pixels (B, 3, H, W) in [-1, 1] -> moments (B, 2z, H / f, W / f): mean and log-variance of raw latents."""
        moments = self.encoder(run, pixels)
        return moments if self.quant_conv is None else run.conv(moments, self.quant_conv)

    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Raw latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1]."""
        if self.post_quant_conv is not None:
            latents = run.conv(latents, self.post_quant_conv)
        return self.decoder(run, latents)
