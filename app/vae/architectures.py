"""The architectures: one row each. To add one, write its network into a file and add a row.

A row's functions are given its own class of configuration. Canonical names are those of LDM or, where that never had
such a network, its publisher's: the names that our network's attributes have.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from app.terms import EXECUTIONS, ExecutionName
from app.vae import layout_dc, layout_hunyuan, layout_kl, layout_tiny, layout_wan, layout_wan22
from app.vae.autoencoder import Autoencoder, Config, Shape, Shapes
from app.vae.autoencoder_dc import AutoencoderDC, DCConfig
from app.vae.autoencoder_hunyuan import AutoencoderHunyuan, HunyuanConfig
from app.vae.autoencoder_kl import NORM_GROUPS, AutoencoderKL, KLConfig
from app.vae.autoencoder_tiny import AutoencoderTiny, TinyConfig
from app.vae.autoencoder_wan import (
    TEMPORAL_FACTOR,
    AutoencoderWan,
    WanClipConfig,
    WanConfig,
    clip_tensors,
    picture_tensors,
)
from app.vae.autoencoder_wan22 import (
    AutoencoderWan22,
    QwenImage21Config,
    Wan22ClipConfig,
    Wan22Config,
    patched_clip_tensors,
    patched_picture_tensors,
)
from app.vae.families import FAMILIES
from app.vae.latent_format import Constant

Told = Callable[[Shapes], bool]
"""Whether these are the tensors of such an autoencoder, or of one half, by their keys in any layout it comes in."""


@dataclass(frozen=True)
class Diffusers:
    """How diffusers keeps an architecture."""

    # Its classes, and the scaling_factor that a config.json without one means; None: what the weights' own row has.
    classes: Mapping[str, Constant | None]
    act_fn: str | None  # the one that our network has; None where its config.json has no such key
    keys: Callable[[Iterable[str]], dict[str, str]]  # {canonical name: diffusers key}
    # config.json but for the family's constants, given whether fp16 is known to be sound; raises UnsupportedCheckpoint
    config: Callable[[Any, bool], dict[str, object]]
    shape: Callable[[str, Shape], Shape] = lambda name, shape: shape  # of a canonical name, given the canonical one
    # Of a config.json that says it: what no shape tells, and our network has.
    expects: Mapping[str, object] = field(default_factory=dict)


Resident = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
"""What of a network's tensors a canonical one of a file is, by name."""


@dataclass(frozen=True)
class Clips:
    """What of a network whose pictures are clips of one frame differs where it takes clips; see `execution.causal`."""

    config: type[Config]
    configure: Callable[[Any], Config]  # given the configuration for pictures; raises UnsupportedCheckpoint
    resident: Resident
    temporal_factor: int  # frames per latent frame but the first, which is one


@dataclass(frozen=True)
class Architecture:
    """What tells an architecture, and everything about it that its network does not say."""

    name: str
    told: Told
    config: type[Config]
    # The configuration, given the shapes by canonical names and the declared group count of the norms, if any.
    # Raises UnsupportedCheckpoint.
    configure: Callable[[Shapes, int | None], Config]
    module: Callable[[Any], Autoencoder]
    keys: Callable[[Iterable[str]], dict[str, str]]  # {key in any layout: canonical name}
    diffusers: Diffusers
    # The convolution that makes the picture, by its canonical name; None where the decoder does not end in a plain one.
    output: Callable[[Any], str | None]
    shape: Callable[[str, Shape], Shape] = lambda name, shape: shape  # the canonical one, given that of any layout
    resident: Resident = lambda name, tensor: ((name, tensor),)  # itself, but where a file has more than runs
    # Canonical names of tensors that are never all zero in a file that is whole.
    never_zero: frozenset[str] = frozenset()
    # The end of a key in the publisher's layout, and of the canonical names of its equal parts, first rows first.
    parts: tuple[str, tuple[str, ...]] | None = None
    encoder: tuple[str, ...] = ("encoder.",)  # canonical names begin so; all others are the decoder's
    statistics: tuple[str, ...] = ()  # names begin so: the latents' statistics, kept as they are in every precision
    counters: frozenset[str] = frozenset()  # of training: some files lack them, and nothing reads them
    # What no shape tells, where it is not the usual: keys of a sidecar and their values.
    untold: Callable[[Any], dict[str, int]] = lambda config: {}
    executions: tuple[ExecutionName, ...] = EXECUTIONS
    temporal_factor: int = 1  # 1: a network of pictures
    clips: Clips | None = None


def _kl_told(shapes: Shapes) -> bool:
    """A residual block of plain convolutions of two dimensions and GroupNorms in level 0 of either half."""
    if layout_hunyuan.told(shapes):  # which has such blocks, too
        return False
    blocks = [f"{half}.{level}" for half, way in (("encoder", "down"), ("decoder", "up")) for level in _levels(way)]
    plain = [block for block in blocks if f"{block}.norm1.gamma" not in shapes]
    return any(len(shapes.get(f"{block}.conv2.weight", ())) == 4 for block in plain)


def _levels(way: str) -> tuple[str, str]:
    return f"{way}.0.block.0", f"{way}_blocks.0.resnets.0"


QUANT = frozenset({"conv1.weight", "conv2.weight"})
"""All zero in a revision of Qwen-Image's, which makes pictures of one colour."""

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="dc",
            told=lambda shapes: any(layout_dc.KEY.match(key) for key in shapes),
            config=DCConfig,
            configure=lambda shapes, groups: DCConfig.from_shapes(shapes),
            module=AutoencoderDC,
            keys=layout_dc.published_keys,
            shape=layout_dc.canonical_shape,
            parts=layout_dc.PARTS,
            diffusers=Diffusers(
                classes={"AutoencoderDC": 1.0},
                act_fn="silu",
                keys=layout_dc.diffusers_keys,
                shape=layout_dc.diffusers_shape,
                config=layout_dc.diffusers_config,
                expects=layout_dc.EXPECTS,
            ),
            output=lambda config: config.output,
        ),
        Architecture(
            name="hunyuan",
            told=layout_hunyuan.told,
            config=HunyuanConfig,
            configure=lambda shapes, groups: HunyuanConfig.from_shapes(shapes),
            module=AutoencoderHunyuan,
            keys=layout_hunyuan.published_keys,
            diffusers=Diffusers(
                classes={"AutoencoderKLHunyuanImage": 1.0},
                act_fn="silu",
                keys=layout_hunyuan.diffusers_keys,
                config=layout_hunyuan.diffusers_config,
                expects=layout_hunyuan.EXPECTS,
            ),
            output=lambda config: "decoder.conv_out",
        ),
        Architecture(
            name="kl",
            told=_kl_told,
            config=KLConfig,
            configure=lambda shapes, groups: KLConfig.from_shapes(shapes, groups or NORM_GROUPS),
            module=AutoencoderKL,
            keys=layout_kl.ldm_keys,
            shape=layout_kl.ldm_shape,
            diffusers=Diffusers(
                classes={"AutoencoderKL": FAMILIES["sd1"].latent_format.scaling_factor, "AutoencoderKLFlux2": 1.0},
                act_fn="silu",
                keys=layout_kl.diffusers_keys,
                shape=layout_kl.diffusers_shape,
                config=layout_kl.diffusers_config,
            ),
            output=lambda config: "decoder.conv_out",
            encoder=("encoder.", "quant_conv."),
            statistics=("bn.",),
            counters=frozenset({"bn.num_batches_tracked"}),
            untold=lambda config: {"norm_num_groups": config.norm_groups} if config.norm_groups != NORM_GROUPS else {},
        ),
        Architecture(
            name="tiny",
            told=lambda shapes: any(layout_tiny.KEY.match(key) for key in shapes),
            config=TinyConfig,
            configure=lambda shapes, groups: TinyConfig.from_shapes(shapes),
            module=AutoencoderTiny,
            keys=layout_tiny.taesd_keys,
            diffusers=Diffusers(
                classes={"AutoencoderTiny": 1.0},
                act_fn="relu",
                keys=layout_tiny.diffusers_keys,
                config=layout_tiny.diffusers_config,
            ),
            output=lambda config: config.output,
        ),
        Architecture(
            name="wan21",
            told=layout_wan.told,
            config=WanConfig,
            configure=lambda shapes, groups: WanConfig.from_shapes(shapes),
            module=AutoencoderWan,
            keys=layout_wan.wan_keys,
            diffusers=Diffusers(
                classes={"AutoencoderKLWan": None, "AutoencoderKLQwenImage": None},
                act_fn=None,
                keys=layout_wan.diffusers_keys,
                config=layout_wan.diffusers_config,
            ),
            output=lambda config: "decoder.head.2",
            encoder=("encoder.", "conv1."),
            resident=picture_tensors,
            clips=Clips(WanClipConfig, WanConfig.for_clips, clip_tensors, TEMPORAL_FACTOR),
            never_zero=QUANT,
        ),
        Architecture(
            name="wan22",
            told=lambda shapes: layout_wan22.levels(shapes) == len(Wan22Config.multiples),
            config=Wan22Config,
            configure=lambda shapes, groups: Wan22Config.from_shapes(shapes),
            module=AutoencoderWan22,
            keys=layout_wan22.wan22_keys,
            diffusers=Diffusers(
                classes={},  # AutoencoderKLWan: two networks, and one row says how its config.json is read
                act_fn=None,
                keys=layout_wan22.diffusers_keys,
                shape=layout_wan22.deep_shape,
                config=layout_wan22.diffusers_config,
            ),
            output=lambda config: "decoder.head.2",
            encoder=("encoder.", "conv1."),
            resident=patched_picture_tensors,
            clips=Clips(Wan22ClipConfig, Wan22Config.for_clips, patched_clip_tensors, TEMPORAL_FACTOR),
            never_zero=QUANT,
        ),
        Architecture(
            name="qwenimage21",
            told=lambda shapes: layout_wan22.levels(shapes) == len(QwenImage21Config.multiples),
            config=QwenImage21Config,
            configure=lambda shapes, groups: QwenImage21Config.from_shapes(shapes),
            module=AutoencoderWan22,
            keys=layout_wan22.wan22_keys,
            shape=layout_wan22.flat_shape,
            diffusers=Diffusers(
                classes={"AutoencoderKLQwenImage21": None},
                act_fn=None,
                keys=layout_wan22.diffusers_keys,
                config=layout_wan22.diffusers_config,
            ),
            output=lambda config: "decoder.head.2",
            encoder=("encoder.", "conv1."),
            resident=picture_tensors,
            never_zero=QUANT,
        ),
    )
}


def told(shapes: Shapes) -> Architecture:
    """The row of these tensors, without what stands before them in a full checkpoint.

    Where no row is told it is `kl`, whose words are the field's: its configuration names what the file lacks.
    """
    return next((row for row in ARCHITECTURES.values() if row.told(shapes)), ARCHITECTURES["kl"])


def architecture_of(config: Config) -> Architecture:
    """The row that a configuration belongs to; of a network for clips, the one of pictures with what differs."""
    for row in ARCHITECTURES.values():
        if row.clips is not None and type(config) is row.clips.config:
            clips, factor = row.clips, row.clips.temporal_factor
            return replace(row, config=clips.config, resident=clips.resident, temporal_factor=factor)
    return next(row for row in ARCHITECTURES.values() if type(config) is row.config)


def diffusers_classes() -> dict[str, tuple[Architecture, Constant | None]]:
    """All classes of diffusers that we read, with their default scaling_factor."""
    return {name: (row, default) for row in ARCHITECTURES.values() for name, default in row.diffusers.classes.items()}
