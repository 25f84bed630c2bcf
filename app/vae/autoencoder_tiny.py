"""AutoencoderTiny: TAESD and its kin (TAESDXL, TAESD3, TAEF1, TAEF2, the f32 variant for Sana), in one file.

Each half is a plain list of layers whose positions are the checkpoint's keys (`decoder.3.conv.0.weight`), as in
github.com/madebyollin/taesd. Widths, depths, strides and the TAEF2 branch are read off the keys and shapes.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from app.errors import UnsupportedCheckpoint
from app.execution.norms import GroupNorm
from app.execution.primitive import Activation, Execution, tanh_clamp
from app.vae.autoencoder import Autoencoder, Shapes
from app.vae.posterior import Dirac, Posterior

POOL_GROUPS = 4  # of the GroupNorm in TAEF2's mid-blocks


@dataclass(frozen=True)
class TinyLayer:
    """One position of a half: a 3x3 convolution, or a `Block` of three."""

    index: int  # the number in the checkpoint's key
    c_in: int
    c_out: int
    block: bool = False
    pool: bool = False  # a Block with TAEF2's GroupNorm branch
    bias: bool = True
    stride: int = 1
    up: bool = False  # doubled by nearest neighbour before the convolution
    relu: bool = False  # after the convolution


@dataclass(frozen=True)
class TinyConfig:
    """The layers of both halves, in order."""

    encoder: tuple[TinyLayer, ...]
    decoder: tuple[TinyLayer, ...]

    pixel_channels = 3

    @property
    def latent_channels(self) -> int:
        """Channels of the latent that the decoder takes."""
        return self.decoder[0].c_in

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return 1 << sum(layer.up for layer in self.decoder)

    @property
    def statistics_bytes(self) -> int:
        """Latents have no statistics of their own."""
        return 0

    @property
    def output(self) -> str | None:
        """The canonical name of the convolution that makes the picture; None where the last layer is no plain one."""
        last = self.decoder[-1]
        return None if last.block or last.relu or not last.bias else f"decoder.{last.index}"

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "TinyConfig":
        """Reads the layers off a state dict's shapes, keys `encoder.N...` and `decoder.N...` numbered as TAESD's.

        Raises UnsupportedCheckpoint when the keys are not those of a tiny autoencoder.
        """
        config = cls(encoder=_layers(shapes, "encoder"), decoder=_layers(shapes, "decoder"))
        if (down := 1 << sum(layer.stride == 2 for layer in config.encoder)) != config.spatial_factor:
            raise UnsupportedCheckpoint(
                f"encoder reduces {down} times, decoder enlarges {config.spatial_factor} times: not one autoencoder"
            )
        return config


def _layers(shapes: Shapes, half: str) -> tuple[TinyLayer, ...]:
    """The layers of one half.

    Positions without weights are activations and up-samplings: after a convolution with a bias a gap is a ReLU,
    before one without a bias it is the up-sampling. Convolutions without a bias resample; so do all convolutions
    of the encoder that a ReLU follows (the stem of the f32 variant).
    """
    numbers = {key.split(".")[1] for key in shapes if key.startswith(f"{half}.")}
    indices = sorted(int(number) for number in numbers if number.isdecimal())
    layers: list[TinyLayer] = []
    for position, index in enumerate(indices):
        stem = f"{half}.{index}"
        block = f"{stem}.conv.0.weight" in shapes
        first = shapes.get(f"{stem}.conv.0.weight" if block else f"{stem}.weight")
        last = shapes.get(f"{stem}.conv.4.weight" if block else f"{stem}.weight")
        if first is None or last is None or len(first) != 4 or len(last) != 4 or 0 in (*first, *last):
            raise UnsupportedCheckpoint(f"{stem} is neither a convolution nor a block of a tiny autoencoder")
        bias = block or f"{stem}.bias" in shapes
        gap = not block and position + 1 < len(indices) and indices[position + 1] > index + 1
        layers.append(
            TinyLayer(
                index=index,
                c_in=first[1],
                c_out=last[0],
                block=block,
                pool=f"{stem}.pool.0.weight" in shapes,
                bias=bias,
                stride=2 if half == "encoder" and (not bias or gap) else 1,
                up=half == "decoder" and not bias,
                relu=gap,
            )
        )
    if not layers:
        raise UnsupportedCheckpoint(f"a tiny autoencoder has keys {half}.N.weight; this file has none")
    return tuple(layers)


class Block(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h, w): relu(three convolutions + skip)."""

    def __init__(self, c_in: int, c_out: int, pool: bool) -> None:
        super().__init__()
        convs = [nn.Conv2d(c, c_out, kernel_size=3, padding=1) for c in (c_in, c_out, c_out)]
        self.conv: Any = nn.ModuleDict({"0": convs[0], "2": convs[1], "4": convs[2]})
        self.skip = nn.Conv2d(c_in, c_out, kernel_size=1, bias=False) if c_in != c_out else None
        self.pool: Any = None
        if pool:
            wide = POOL_GROUPS * c_in
            self.pool = nn.ModuleDict(
                {
                    "0": nn.Conv2d(c_in, wide, kernel_size=1, bias=False),
                    "1": GroupNorm(POOL_GROUPS, wide),
                    "3": nn.Conv2d(wide, c_in, kernel_size=1, bias=False),
                }
            )

    def forward(self, run: Execution[Any], x: Any) -> Any:
        if self.pool is not None:
            wide = run.conv(x, self.pool["0"])
            x = run.conv(wide, self.pool["3"], norm=self.pool["1"], act=F.relu, add=x)
        h = run.conv(x, self.conv["0"], then=F.relu)
        if self.skip is not None:
            x = run.conv(x, self.skip)
        h = run.conv(h, self.conv["2"], then=F.relu)
        return run.conv(h, self.conv["4"], add=x, then=F.relu)


def _modules(layers: tuple[TinyLayer, ...]) -> nn.ModuleDict:
    modules = nn.ModuleDict()
    for layer in layers:
        modules[str(layer.index)] = (
            Block(layer.c_in, layer.c_out, layer.pool)
            if layer.block
            else nn.Conv2d(layer.c_in, layer.c_out, 3, stride=layer.stride, padding=1, bias=layer.bias)
        )
    return modules


def _run(
    run: Execution[Any], x: Any, layers: tuple[TinyLayer, ...], modules: Any, act: Activation | None = None
) -> Any:
    """The layers one after the other; `act` comes before the first."""
    for layer in layers:
        module = modules[str(layer.index)]
        if layer.block:
            x = module(run, x)
        else:
            x = run.conv(x, module, act=act, up=layer.up, then=F.relu if layer.relu else None)
        act = None
    return x


class AutoencoderTiny(Autoencoder):
    """Both halves. Pixels are in [0, 1]; latents are what the diffusion model sees, without a scale factor."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config: TinyConfig = config
        self.bn = None  # latents have no statistics of their own
        self.encoder = _modules(config.encoder)
        self.decoder = _modules(config.decoder)

    def posterior(self, latents: Tensor) -> Posterior:
        """What `encode` gave, as a (degenerate) distribution over raw latents."""
        return Dirac(latents)

    def encode(self, run: Execution[Any], pixels: Any) -> Any:
        """Pixels (B, 3, H, W) in [0, 1] -> latents (B, z, H / f, W / f)."""
        return _run(run, pixels, self.config.encoder, self.encoder)

    def decode(self, run: Execution[Any], latents: Any) -> Any:
        """Latents (B, z, h, w) -> pixels (B, 3, h * f, w * f), about [0, 1]."""
        return _run(run, latents, self.config.decoder, self.decoder, act=tanh_clamp)
