"""AutoencoderHunyuan: the VAE of HunyuanImage 2.1, in one file, read top to bottom.

The residual blocks of LDM; between levels and at both ends of the latent the shortcuts of DC-AE, with blocks of pixels
in an order of their own. Attribute names are the checkpoint keys of its publisher (github.com/Tencent-Hunyuan/
HunyuanImage-2.1), who numbers the levels of either half in the order in which they run.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.pointwise import FACTOR, Average, Repeat, ToChannels, ToSpace
from app.execution.primitive import Execution
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.posterior import DiagonalGaussian, Posterior

NORM_EPS, NORM_GROUPS = 1e-6, 32  # diffusers, HunyuanImageResnetBlock
BLOCK = FACTOR**2  # positions that a step makes of one
COLOURS = 3


@dataclass(frozen=True)
class HunyuanConfig:
    """What the shapes of a checkpoint say."""

    widths: tuple[int, ...]  # channels per level of both halves, the finest first
    encoder_depth: int  # residual blocks per level
    decoder_depth: int
    latent_channels: int

    pixel_channels = 3
    statistics_bytes = 0

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return 1 << (len(self.widths) - 1)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "HunyuanConfig":
        """Reads the configuration off a state dict's shapes, keys as the publisher has them.

        Raises UnsupportedCheckpoint when the keys are not those of such an autoencoder.
        """
        widths, encoder_depth = _levels(shapes, "encoder.down")
        coarsest_first, decoder_depth = _levels(shapes, "decoder.up")
        if coarsest_first != widths[::-1]:
            raise UnsupportedCheckpoint(
                f"{widths} channels in the encoder, {coarsest_first[::-1]} in the decoder: not one HunyuanImage VAE"
            )
        latent = _shape(shapes, "decoder.conv_in.weight")[1]
        coarsest = widths[-1]
        steps = all(BLOCK * fine % coarse == 0 for fine, coarse in pairwise(widths))
        if any(width % NORM_GROUPS for width in widths) or coarsest % (2 * latent) or not steps:
            raise UnsupportedCheckpoint(f"{widths} channels do not divide as those of HunyuanImage's VAE do")
        return cls(widths, encoder_depth, decoder_depth, latent)


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UnsupportedCheckpoint(f"HunyuanImage's VAE has the key {key}; this file has not")
    if len(shapes[key]) != 4 or 0 in shapes[key]:
        raise UnsupportedCheckpoint(f"{key} has shape {shapes[key]}; a convolution's four sides were expected")
    return shapes[key]


def _levels(shapes: Shapes, stem: str) -> tuple[tuple[int, ...], int]:
    """(channels of each level, blocks per level) of `encoder.down` or `decoder.up`, in the order of the keys."""
    widths: list[int] = []
    while (key := f"{stem}.{len(widths)}.block.0.conv2.weight") in shapes:
        widths.append(_shape(shapes, key)[0])
    if not widths:
        _shape(shapes, f"{stem}.0.block.0.conv2.weight")
    depth = 1
    while f"{stem}.0.block.{depth}.conv2.weight" in shapes:
        depth += 1
    return tuple(widths), depth


def _conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """(B, c, h, w) -> the same; only steps change the number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = _conv3(channels, channels)
        self.norm2 = _norm(channels)
        self.conv2 = _conv3(channels, channels)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        h = run.conv(x, self.conv1, norm=self.norm1, act=F.silu)
        return run.conv(h, self.conv2, norm=self.norm2, act=F.silu, add=x)


class AttnBlock(nn.Module):
    """(B, c, h, w) -> the same, every position attending to all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.attention(x, self)


class Mid(nn.Module):
    """The coarsest level of either half: block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return self.block_2(run, self.attn_1(run, self.block_1(run, x)))


class Downsample(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h / 2, w / 2): blocks of pixels become channels.

    What goes past the convolution is averaged before it is moved: groups of neighbours among the moved channels are
    groups of neighbours among the channels, as blocks come first there.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = _conv3(c_in, c_out // BLOCK)
        self.past = Average(BLOCK * c_in // c_out)
        self.move = ToChannels(blocks_first=True)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.apply(self.move, run.conv(x, self.conv, add=run.apply(self.past, x)))


class Upsample(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2 h, 2 w): the same from channels to blocks of pixels."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = _conv3(c_in, c_out * BLOCK)
        self.past = Repeat(BLOCK * c_out // c_in)
        self.move = ToSpace(blocks_first=True)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.apply(self.move, run.conv(x, self.conv, add=run.apply(self.past, x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next one."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels) for _ in range(depth))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, run: Execution[Any], x: Any) -> Any:
        for block in self.block:
            x = block(run, x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(run, x)
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> (B, 2z, H / f, W / f)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        widths, made = config.widths, 2 * config.latent_channels
        self.conv_in = _conv3(COLOURS, widths[0])
        self.down = nn.ModuleList(Level(width, config.encoder_depth) for width in widths)
        for level, (fine, coarse) in zip(self.down, pairwise(widths), strict=False):
            level.downsample = Downsample(fine, coarse)
        self.mid = Mid(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], made)
        self.mean = Average(widths[-1] // made)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        x = run.conv(x, self.conv_in)
        for level in self.down:
            x = level(run, x)
        x = self.mid(run, x)
        return run.conv(x, self.conv_out, norm=self.norm_out, act=F.silu, add=run.apply(self.mean, x))


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1]."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = _conv3(config.latent_channels, widths[0])
        self.copies = Repeat(widths[0] // config.latent_channels)
        self.mid = Mid(widths[0])
        self.up = nn.ModuleList(Level(width, config.decoder_depth) for width in widths)
        for level, (coarse, fine) in zip(self.up, pairwise(widths), strict=False):
            level.upsample = Upsample(coarse, fine)
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], COLOURS)

    def forward(self, run: Execution[Any], z: Any) -> Any:
        x = run.conv(z, self.conv_in, add=run.apply(self.copies, z))
        x = self.mid(run, x)
        for level in self.up:
            x = level(run, x)
        return run.conv(x, self.conv_out, norm=self.norm_out, act=F.silu)


class AutoencoderHunyuan(Autoencoder):
    """Both halves."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.config: HunyuanConfig = config
        self.bn = None  # latents have no statistics of their own
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, moments: Tensor) -> Posterior:
        """What `encode` gave, as a distribution over raw latents."""
        return DiagonalGaussian(moments)

    def encode(self, run: Execution[Any], pixels: Any) -> Any:
        """Pixels (B, 3, H, W) in [-1, 1] -> moments (B, 2z, H / f, W / f): mean and log-variance of raw latents."""
        return self.encoder(run, pixels)

    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Raw latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1]."""
        return self.decoder(run, latents)
