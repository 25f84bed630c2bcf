"""AutoencoderDC: the deep compression autoencoder (DC-AE) of Sana, in one file, read top to bottom.

Attribute names are the checkpoint keys of its publisher (github.com/mit-han-lab/efficientvit), but for its `qkv`, which
is three convolutions here. Latents have no variance, and no norm is over the map: what is global are the sums of linear
attention. Reference: Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models",
arXiv:2410.10733.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.norms import AffineRMSNorm
from app.execution.pointwise import FACTOR, Add, Average, Gate, Join, LinearAttention, Repeat, ToChannels, ToSpace
from app.execution.primitive import Execution
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.posterior import Dirac, Posterior

NORM_EPS = 1e-5  # diffusers, AutoencoderDC
HEAD = 32  # channels of a head of attention where no second branch tells them; every published file has as many
BLOCK = FACTOR**2  # positions that a step makes of one
COLOURS = 3

Kind = Literal["res", "vit"]


@dataclass(frozen=True)
class DCHalf:
    """One half, level by level, the finest first."""

    widths: tuple[int, ...]  # channels
    depths: tuple[int, ...]  # blocks; none in the first level: the outer convolution then takes its step
    kinds: tuple[Kind, ...]  # of the blocks
    kernels: tuple[int, ...]  # sides of those of attention's second branch; 0 where it has none
    shuffles: bool  # whether steps move channels to space, or space to channels; else nearest neighbour, or a stride
    head: int = HEAD


@dataclass(frozen=True)
class DCConfig:
    """What the shapes of a checkpoint say."""

    encoder: DCHalf
    decoder: DCHalf
    latent_channels: int

    pixel_channels = 3
    statistics_bytes = 0

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return 1 << (len(self.encoder.widths) - 1)

    @property
    def output(self) -> str | None:
        """The canonical name of the convolution that makes the picture; None where it makes four pixels at once."""
        if self.decoder.depths[0]:
            return "decoder.project_out.op_list.2.conv"
        return None if self.decoder.shuffles else "decoder.project_out.op_list.2.conv.conv"

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "DCConfig":
        """Reads the configuration off a state dict's shapes, by canonical names.

        Raises UnsupportedCheckpoint when the keys are not those of an AutoencoderDC, and for its relatives with batch
        norms in the decoder.
        """
        if any(key.endswith(".norm.running_mean") for key in shapes):
            raise UnsupportedCheckpoint("an AutoencoderDC with batch norms (dc-ae-*-in, dc-ae-*-mix) is not supported")
        encoder, decoder = _half(shapes, "encoder"), _half(shapes, "decoder")
        if len(encoder.widths) != len(decoder.widths):
            raise UnsupportedCheckpoint(
                f"encoder has {len(encoder.widths)} levels, decoder {len(decoder.widths)}: not one autoencoder"
            )
        latent = _shape(shapes, "decoder.project_in.main.conv.weight")[1]
        for half in (encoder, decoder):
            _check_divides(half, latent)
        return cls(encoder, decoder, latent)


def _check_divides(half: DCHalf, latent: int) -> None:
    """Raises UnsupportedCheckpoint where shortcuts or heads would cut through channels."""
    heads = [width for width, kind in zip(half.widths, half.kinds, strict=True) if kind == "vit"]
    steps = pairwise(half.widths)
    if (
        any(width % half.head for width in heads)
        or half.widths[-1] % latent
        or any(BLOCK * fine % coarse or coarse % BLOCK for fine, coarse in steps)
    ):
        raise UnsupportedCheckpoint(f"{half.widths} channels do not divide as an AutoencoderDC's do")


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UnsupportedCheckpoint(f"an AutoencoderDC has the key {key}; this file has not")
    if len(shapes[key]) not in (2, 4) or 0 in shapes[key]:
        raise UnsupportedCheckpoint(f"{key} has shape {shapes[key]}; that of a convolution was expected")
    return shapes[key]


def _half(shapes: Shapes, half: str) -> DCHalf:
    """The levels of `encoder` or `decoder`: a level of the one ends in its step, one of the other begins with it."""
    numbers = {key.split(".")[2] for key in shapes if key.startswith(f"{half}.stages.")}
    levels = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    if not 1 < levels <= len(shapes):
        raise UnsupportedCheckpoint(f"an AutoencoderDC has keys {half}.stages.N.op_list.M; this file has not")
    decodes = half == "decoder"
    found = [_level(shapes, f"{half}.stages.{i}.op_list", decodes and i < levels - 1) for i in range(levels)]
    if missing := next((i for i, level in enumerate(found[1:], start=1) if not level.depth), None):
        raise UnsupportedCheckpoint(f"an AutoencoderDC has blocks in {half}.stages.{missing}; this file has not")
    first = 0 if found[0].depth else 1
    if decodes:
        step = f"decoder.stages.{first}.op_list.0.main.conv.conv.weight"
        shuffles = step in shapes and _shape(shapes, step)[0] != found[first].width
    else:
        step = f"encoder.stages.{first}.op_list.{found[first].depth}.main.conv.weight"
        shuffles = step in shapes and _shape(shapes, step)[0] != found[first + 1].width
    return DCHalf(
        widths=tuple((level if level.depth else found[1]).width for level in found),
        depths=tuple(level.depth for level in found),
        kinds=tuple(level.kind for level in found),
        kernels=tuple(level.kernel for level in found),
        shuffles=shuffles,
        head=next((level.head for level in found if level.kernel), HEAD),
    )


@dataclass(frozen=True)
class _Level:
    width: int = 0
    depth: int = 0
    kind: Kind = "res"
    kernel: int = 0
    head: int = HEAD


def _level(shapes: Shapes, stem: str, stepped: bool) -> _Level:
    """The blocks of one level; `stepped` where their numbers begin with 1."""
    level = _Level()
    while True:
        block = f"{stem}.{level.depth + stepped}"
        attention = f"{block}.context_module.main"
        if (key := f"{block}.main.conv2.conv.weight") in shapes:
            level = _Level(_shape(shapes, key)[0], level.depth + 1)
        elif (key := f"{attention}.proj.conv.weight") in shapes:
            kernel, head = 0, HEAD
            if (branch := f"{attention}.aggreg.0.0.weight") in shapes:
                kernel, head = _shape(shapes, branch)[-1], _shape(shapes, f"{attention}.aggreg.0.1.weight")[1]
            level = _Level(_shape(shapes, key)[0], level.depth + 1, "vit", kernel, head)
        else:
            return level


class _Conv(nn.Module):
    """A convolution by the names of the publisher's layers: `conv`, and `norm` behind it."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 3, *, bias: bool = True, norm: bool = False, groups: int = 1
    ):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias, groups=groups)
        self.norm: Any = AffineRMSNorm(c_out, NORM_EPS) if norm else None


class ResBlock(nn.Module):
    """(B, c, h, w) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main: Any = nn.ModuleDict(
            {"conv1": _Conv(channels, channels), "conv2": _Conv(channels, channels, bias=False, norm=True)}
        )

    def forward(self, run: Execution[Any], x: Any) -> Any:
        first, second = self.main["conv1"], self.main["conv2"]
        # Nested, here and below, as a name for a map would keep it alive while the next is made.
        return run.apply(Add(second.norm), run.conv(run.conv(x, first.conv, then=F.silu), second.conv), x)


class Attention(nn.Module):
    """(B, c, h, w) -> the same: linear attention, in half of the heads over a neighbourhood of each position."""

    def __init__(self, channels: int, kernel: int, head: int) -> None:
        super().__init__()
        main = nn.ModuleDict({name: nn.Conv2d(channels, channels, 1, bias=False) for name in ("to_q", "to_k", "to_v")})
        wide = 3 * channels
        if kernel:
            branch = {
                "0": nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False),
                "1": nn.Conv2d(wide, wide, 1, groups=wide // head, bias=False),
            }
            main["aggreg"] = nn.ModuleDict({"0": nn.ModuleDict(branch)})
        main["proj"] = _Conv(channels * (2 if kernel else 1), channels, 1, bias=False, norm=True)
        self.main: Any = main
        self.wider = bool(kernel)
        self.heads = LinearAttention(head)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        proj = self.main["proj"]
        return run.apply(Add(proj.norm), run.conv(run.apply(self.heads, self.qkv(run, x)), proj.conv), x)

    def qkv(self, run: Execution[Any], x: Any) -> Any:
        """(B, c, h, w) -> (B, 3c, h, w), or twice as many channels with the second branch."""
        qkv = run.apply(Join(), *(run.conv(x, self.main[name]) for name in ("to_q", "to_k", "to_v")))
        if not self.wider:
            return qkv
        depthwise, mix = (self.main["aggreg"]["0"][each] for each in "01")
        return run.apply(Join(), qkv, run.conv(run.conv(qkv, depthwise), mix))


class Mixer(nn.Module):
    """(B, c, h, w) -> the same: a gated, depthwise, inverted bottleneck four times as wide (GLUMBConv)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.main: Any = nn.ModuleDict(
            {
                "inverted_conv": _Conv(channels, 2 * wide, 1),
                "depth_conv": _Conv(2 * wide, 2 * wide, groups=2 * wide),
                "point_conv": _Conv(wide, channels, 1, bias=False, norm=True),
            }
        )

    def forward(self, run: Execution[Any], x: Any) -> Any:
        inverted, depth, point = (self.main[name] for name in ("inverted_conv", "depth_conv", "point_conv"))
        wide = run.conv(run.conv(x, inverted.conv, then=F.silu), depth.conv)
        return run.apply(Add(point.norm), run.conv(run.apply(Gate(), wide), point.conv), x)


class EfficientViTBlock(nn.Module):
    """(B, c, h, w) -> the same: attention, then the mixer."""

    def __init__(self, channels: int, kernel: int, head: int) -> None:
        super().__init__()
        self.context_module = Attention(channels, kernel, head)
        self.local_module = Mixer(channels)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return self.local_module(run, self.context_module(run, x))


class Down(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h / 2, w / 2)."""

    def __init__(self, c_in: int, c_out: int, shuffles: bool) -> None:
        super().__init__()
        made, stride = (c_out // BLOCK, 1) if shuffles else (c_out, FACTOR)
        self.conv = nn.Conv2d(c_in, made, 3, stride, padding=1)
        self.shuffles = shuffles

    def forward(self, run: Execution[Any], x: Any, past: Any = None) -> Any:
        if not self.shuffles:
            return run.conv(x, self.conv, add=past)
        moved = run.apply(ToChannels(), run.conv(x, self.conv))
        return moved if past is None else run.apply(Add(), moved, past)


class Up(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2 h, 2 w)."""

    def __init__(self, c_in: int, c_out: int, shuffles: bool) -> None:
        super().__init__()
        self.conv = _Conv(c_in, c_out * BLOCK if shuffles else c_out)
        self.shuffles = shuffles

    def forward(self, run: Execution[Any], x: Any, past: Any = None, **before: Any) -> Any:
        if not self.shuffles:
            return run.conv(x, self.conv.conv, up=True, add=past, **before)
        moved = run.apply(ToSpace(), run.conv(x, self.conv.conv, **before))
        return moved if past is None else run.apply(Add(), moved, past)


class Step(nn.Module):
    """To the next level, and past the convolution: means of channels on the way down, copies of them on the way up."""

    def __init__(self, c_in: int, c_out: int, shuffles: bool, up: bool) -> None:
        super().__init__()
        self.main = (Up if up else Down)(c_in, c_out, shuffles)
        self.past = ToSpace(repeat=BLOCK * c_out // c_in) if up else ToChannels(average=BLOCK * c_in // c_out)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        return self.main(run, x, run.apply(self.past, x))


class Level(nn.Module):
    """The blocks of one resolution, and a step before or behind them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(layers)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        for layer in self.op_list:
            x = layer(run, x)
        return x


def _blocks(half: DCHalf, level: int) -> list[nn.Module]:
    width = half.widths[level]
    return [
        ResBlock(width) if half.kinds[level] == "res" else EfficientViTBlock(width, half.kernels[level], half.head)
        for _ in range(half.depths[level])
    ]


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, z, H / f, W / f)."""

    def __init__(self, half: DCHalf, latent: int) -> None:
        super().__init__()
        widths = half.widths
        self.project_in: Any = _Conv(COLOURS, widths[0]) if half.depths[0] else Down(COLOURS, widths[0], half.shuffles)
        self.stages = nn.ModuleList()
        for level in range(len(widths)):
            layers = _blocks(half, level)
            if layers and level < len(widths) - 1:
                layers.append(Step(widths[level], widths[level + 1], half.shuffles, up=False))
            self.stages.append(Level(layers))
        self.project_out: Any = nn.ModuleDict({"main": Level([_Conv(widths[-1], latent)])})
        self.mean = Average(widths[-1] // latent)

    def forward(self, run: Execution[Any], x: Any) -> Any:
        x = run.conv(x, self.project_in.conv) if isinstance(self.project_in, _Conv) else self.project_in(run, x)
        for level in self.stages:
            x = level(run, x)
        return run.conv(x, self.project_out["main"].op_list[0].conv, add=run.apply(self.mean, x))


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1]."""

    def __init__(self, half: DCHalf, latent: int) -> None:
        super().__init__()
        widths = half.widths
        self.project_in: Any = nn.ModuleDict({"main": _Conv(latent, widths[-1])})
        self.copies = Repeat(widths[-1] // latent)
        self.stages = nn.ModuleList()
        for level in range(len(widths)):
            layers = _blocks(half, level)
            if layers and level < len(widths) - 1:
                layers.insert(0, Step(widths[level + 1], widths[level], half.shuffles, up=True))
            self.stages.append(Level(layers))
        last = _Conv(widths[0], COLOURS) if half.depths[0] else Up(widths[0], COLOURS, half.shuffles)
        ends = {"0": AffineRMSNorm(widths[0], NORM_EPS), "2": last}
        self.project_out: Any = nn.ModuleDict({"op_list": nn.ModuleDict(ends)})

    def forward(self, run: Execution[Any], z: Any) -> Any:
        x = run.conv(z, self.project_in["main"].conv, add=run.apply(self.copies, z))
        for level in reversed(self.stages):
            x = level(run, x)
        norm, last = (self.project_out["op_list"][each] for each in "02")
        if isinstance(last, _Conv):
            return run.conv(x, last.conv, norm=norm, act=F.relu)
        return last(run, x, norm=norm, act=F.relu)


class AutoencoderDC(Autoencoder):
    """Both halves."""

    def __init__(self, config: DCConfig) -> None:
        super().__init__()
        self.config: DCConfig = config
        self.bn = None  # latents have no statistics of their own
        self.encoder = Encoder(config.encoder, config.latent_channels)
        self.decoder = Decoder(config.decoder, config.latent_channels)

    def posterior(self, latents: Tensor) -> Posterior:
        """What `encode` gave, as a (degenerate) distribution over raw latents."""
        return Dirac(latents)

    def encode(self, run: Execution[Any], pixels: Any) -> Any:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, z, H / f, W / f)."""
        return self.encoder(run, pixels)

    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Raw latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1]."""
        return self.decoder(run, latents)
