"""AutoencoderHunyuan: the VAE of HunyuanImage 2.1, in one file, read top to bottom.

The residual blocks of AutoencoderKL; between levels and at both ends of the latent the shortcuts of DC-AE, with blocks
of pixels in an order of their own. Attribute names are the checkpoint keys of its publisher, who numbers the levels of
either half in the order in which they run (github.com/Tencent-Hunyuan/HunyuanImage-2.1).
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
from app.vae.autoencoder_kl import NORM_GROUPS, Level, Mid, conv3, group_norm, levels_of, shape_of
from app.vae.posterior import DiagonalGaussian, Posterior

NAME = "HunyuanImage's VAE"
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
        widths, encoder_depth = levels_of(shapes, "encoder.down", NAME)
        coarsest_first, decoder_depth = levels_of(shapes, "decoder.up", NAME)
        if coarsest_first != widths[::-1]:
            raise UnsupportedCheckpoint(
                f"{widths} channels in the encoder, {coarsest_first[::-1]} in the decoder: not one HunyuanImage VAE"
            )
        latent = shape_of(shapes, "decoder.conv_in.weight", NAME)[1]
        coarsest = widths[-1]
        steps = all(BLOCK * fine % coarse == 0 for fine, coarse in pairwise(widths))
        if any(width % NORM_GROUPS for width in widths) or coarsest % (2 * latent) or not steps:
            raise UnsupportedCheckpoint(f"{widths} channels do not divide as those of HunyuanImage's VAE do")
        return cls(widths, encoder_depth, decoder_depth, latent)


class Downsample(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h / 2, w / 2): blocks of pixels become channels.

    What goes past the convolution is averaged before it is moved: groups of neighbours among the moved channels are
    groups of neighbours among the channels, as blocks come first there.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = conv3(c_in, c_out // BLOCK)
        self.past = Average(BLOCK * c_in // c_out)
        self.move = ToChannels(blocks_first=True)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.apply(self.move, run.conv(x, self.conv, add=run.apply(self.past, x)))


class Upsample(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2 h, 2 w): the same from channels to blocks of pixels."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = conv3(c_in, c_out * BLOCK)
        self.past = Repeat(BLOCK * c_out // c_in)
        self.move = ToSpace(blocks_first=True)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return run.apply(self.move, run.conv(x, self.conv, add=run.apply(self.past, x)))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> (B, 2z, H / f, W / f)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        widths, made = config.widths, 2 * config.latent_channels
        self.conv_in = conv3(COLOURS, widths[0])
        self.down = nn.ModuleList(Level(width, width, config.encoder_depth) for width in widths)
        for level, (fine, coarse) in zip(self.down, pairwise(widths), strict=False):
            level.downsample = Downsample(fine, coarse)
        self.mid = Mid(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3(widths[-1], made)
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
        self.conv_in = conv3(config.latent_channels, widths[0])
        self.copies = Repeat(widths[0] // config.latent_channels)
        self.mid = Mid(widths[0])
        self.up = nn.ModuleList(Level(width, width, config.decoder_depth) for width in widths)
        for level, (coarse, fine) in zip(self.up, pairwise(widths), strict=False):
            level.upsample = Upsample(coarse, fine)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3(widths[-1], COLOURS)

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
