"""Every row of the architectures there and back; and a toy architecture, which is one row more and nothing else."""

import json
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from app.engine import compute
from app.engine.forecast import count, network_shape
from app.engine.jobs import Task
from app.engine.planning import ExecutionPlan
from app.errors import UnsupportedCheckpoint
from app.execution.banded import Banded, gather
from app.execution.primitive import Whole
from app.store.checkpoint import blank, load_autoencoder
from app.store.store import open_checkpoint
from app.tools.convert import Output, convert
from app.tools.merge import Blend, merge
from app.vae.architectures import (
    ARCHITECTURES,
    Architecture,
    Diffusers,
    architecture_of,
    told,
)
from app.vae.autoencoder import Autoencoder, Config, Shapes
from app.vae.autoencoder_dc import DCConfig, DCHalf, Kind
from app.vae.autoencoder_hunyuan import HunyuanConfig
from app.vae.autoencoder_kl import KLConfig
from app.vae.autoencoder_wan import WanConfig
from app.vae.autoencoder_wan22 import QwenImage21Config, Wan22Config
from app.vae.families import FAMILIES, Family
from app.vae.latent_format import LatentFormat
from app.vae.layout import replaced
from app.vae.posterior import Dirac
from app.vae.unsupported import unsupported
from tests.store.weights import as_diffusers, canonical, state_of, tiny_config, write

CPU = torch.device("cpu")


def random_kl(draw: random.Random) -> KLConfig:
    levels, groups = draw.randint(1, 4), draw.choice([2, 4, 32])

    def widths() -> tuple[int, ...]:
        return tuple(groups * draw.randint(1, 3) for _ in range(levels))

    quant, post, attention, norm = (draw.random() < 0.5 for _ in range(4))
    return KLConfig(
        encoder_widths=widths(),
        decoder_widths=widths(),
        encoder_depth=draw.randint(1, 3),
        decoder_depth=draw.randint(1, 3),
        latent_channels=draw.choice([4, 16, 32]),
        quant_conv=quant,
        post_quant_conv=post,
        mid_attention=attention,
        batch_norm=norm,
        norm_groups=groups,
    )


def random_half(draw: random.Random, levels: int, head: int) -> DCHalf:
    """Attention in some levels, of which one has the second branch that tells the width of heads."""
    kinds: list[Kind] = [draw.choice(["res", "vit"]) for _ in range(levels - 1)]
    kernels = [draw.choice([0, 3, 5]) if kind == "vit" else 0 for kind in kinds]
    widths = [8 * draw.choice([2, 4]) for _ in range(levels)]
    depths = [draw.choice([0, 1]), *(draw.randint(1, 3) for _ in range(levels - 1))]
    if not depths[0]:
        widths[0], kinds[0], kernels[0] = widths[1], "res", 0
    shuffles = draw.random() < 0.5
    return DCHalf(tuple(widths), tuple(depths), (*kinds, "vit"), (*kernels, 5), shuffles, head)


def random_dc(draw: random.Random) -> DCConfig:
    levels, head = draw.randint(3, 5), draw.choice([4, 8])
    return DCConfig(random_half(draw, levels, head), random_half(draw, levels, head), draw.choice([4, 8]))


def random_hunyuan(draw: random.Random) -> HunyuanConfig:
    widths = tuple(32 * draw.choice([1, 2]) for _ in range(draw.randint(2, 5)))
    depth = draw.randint(1, 3)
    return HunyuanConfig(widths, depth, depth + draw.randint(0, 1), draw.choice([4, 16]))


RANDOM: dict[str, Callable[[random.Random], Config]] = {
    "kl": random_kl,
    "wan21": lambda draw: WanConfig(
        draw.choice([4, 8]), draw.choice([4, 8]), draw.choice([4, 16]), draw.choice([3, 4])
    ),
    "dc": random_dc,
    "hunyuan": random_hunyuan,
    "wan22": lambda draw: Wan22Config(draw.choice([4, 8]), draw.choice([4, 8]), 48, draw.choice([3, 4])),
    "qwenimage21": lambda draw: QwenImage21Config(
        draw.choice([4, 8]), draw.choice([4, 8]), 64, draw.choice([3, 4]), True
    ),
    "tiny": lambda draw: tiny_config(draw.choice(["taesd", "taesd3", "taef2", "taesana"]), draw.choice([4, 8])),
}


def shapes_of(config: Config) -> Shapes:
    return {key: tuple(value.shape) for key, value in blank(config).state_dict().items()}


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 8, 3, 3), (8, 0, 3, 3), (8,) * 5, (1,) * 6], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whatever_shape_a_tensor_has_is_read_or_refused(name, shape):
    row = ARCHITECTURES[name]
    network = blank(RANDOM[name](random.Random(1))).state_dict()
    published = canonical({key: torch.zeros(value.shape) for key, value in network.items()})
    whole = {key: tuple(value.shape) for key, value in published.items()}
    configs = set()
    for key in whole:
        with suppress(UnsupportedCheckpoint):
            configs.add(row.configure(whole | {key: row.shape(key, shape)}, None))
        list(row.resident(key, torch.zeros(row.shape(key, shape), device="meta")))
    for config in configs:
        blank(config)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name, seed):
    config, row = RANDOM[name](random.Random(seed)), ARCHITECTURES[name]
    network = blank(config).state_dict()
    published = canonical({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in network.items()})
    ours = {key: tuple(value.shape) for key, value in published.items()}
    resident = {
        key: tuple(part.shape) for each, tensor in published.items() for key, part in row.resident(each, tensor)
    }
    assert resident == shapes_of(config)
    keys = row.diffusers.keys(ours)
    theirs = {keys[each]: row.diffusers.shape(each, shape) for each, shape in ours.items()}
    assert len(theirs) == len(ours)
    for layout in (ours, theirs):
        assert [each.name for each in ARCHITECTURES.values() if each.told(layout)] == [name]
        assert unsupported(layout) is None
        names = told(layout).keys(layout)
        assert {names[key]: row.shape(names[key], shape) for key, shape in layout.items()} == ours
    assert row.configure(ours, row.untold(config).get("norm_num_groups")) == config
    assert architecture_of(config) is row
    statistics = [value for key, value in blank(config).state_dict().items() if key.startswith(row.statistics)]
    assert config.statistics_bytes == sum(value.nbytes for value in statistics)
    assert row.counters <= {key for key in ours if key.startswith(row.statistics)} or not statistics
    output = row.output(config)
    assert output is None or {f"{output}.{each}" for each in ("weight", "bias")} <= ours.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_either_half_alone_is_told(name):
    shapes = shapes_of(RANDOM[name](random.Random(1)))
    for half in ("encoder.", "decoder."):
        assert told({key: shape for key, shape in shapes.items() if key.startswith(half)}).name == name


def test_every_family_s_architecture_is_a_row():
    assert {family.architecture for family in FAMILIES.values()} == set(ARCHITECTURES)


def test_what_nothing_tells_is_read_as_kl():
    assert told({"encoder.something.weight": (3,)}).name == "kl"


# ------------------------------------------------------------------------------------------------ a toy: the network
@dataclass(frozen=True)
class ToyConfig:
    """A width."""

    width: int
    latent_channels: int

    pixel_channels = 3

    @property
    def spatial_factor(self) -> int:
        return 2

    @property
    def statistics_bytes(self) -> int:
        return 0

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "ToyConfig":
        width, latents = shapes["decoder.stem.weight"][:2]
        return cls(width, latents)


class ToyHalf(nn.Module):
    def __init__(self, c_in: int, width: int, c_out: int, down: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(c_in, width, kernel_size=3, padding=1, stride=2 if down else 1)
        self.norm = nn.GroupNorm(2, width)
        self.mix = nn.Conv2d(width, width, kernel_size=1)
        self.head = nn.Conv2d(width, c_out, kernel_size=3, padding=1)
        self.up = not down

    def forward(self, run: Any, x: Any) -> Any:
        x = run.conv(x, self.stem)
        x = run.conv(x, self.mix, norm=self.norm, act=F.silu, add=x)
        return run.conv(x, self.head, up=self.up)


class ToyAutoencoder(Autoencoder):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config: ToyConfig = config
        self.bn = None
        self.encoder = ToyHalf(3, config.width, config.latent_channels, down=True)
        self.decoder = ToyHalf(config.latent_channels, config.width, 3, down=False)

    def posterior(self, moments: torch.Tensor) -> Dirac:
        return Dirac(moments)

    def encode(self, run: Any, pixels: Any) -> Any:
        return self.encoder(run, pixels)

    def decode(self, run: Any, latents: Any) -> Any:
        return self.decoder(run, latents)


THEIRS = (("down_blocks.0", "stem"), ("mid_block.to_mix", "mix"), ("conv_out", "head"))  # words of KL, for other things


def toy_keys(keys: Iterable[str]) -> dict[str, str]:
    return {key: replaced(key, THEIRS) for key in keys}


def toy_diffusers(names: Iterable[str]) -> dict[str, str]:
    return {name: replaced(name, ((ours, theirs) for theirs, ours in THEIRS)) for name in names}


# -------------------------------------------------------------------------------------------------- its row, its family
TOY = Architecture(
    name="toy",
    told=lambda shapes: any(key.startswith(("encoder.stem.", "encoder.down_blocks.0.weight")) for key in shapes),
    config=ToyConfig,
    configure=lambda shapes, groups: ToyConfig.from_shapes(shapes),
    module=ToyAutoencoder,
    keys=toy_keys,
    shape=lambda name, shape: (*shape[:2], 1, 1) if name.endswith("mix.weight") else shape,
    diffusers=Diffusers(
        classes={"AutoencoderToy": 1.0},
        act_fn="silu",
        keys=toy_diffusers,
        shape=lambda name, shape: shape[:2] if name.endswith("mix.weight") else shape,
        config=lambda config, sound: {"_class_name": "AutoencoderToy", "width": config.width},
    ),
    output=lambda config: "decoder.head",
)
TOYS = Family("toys", "toy", 5, LatentFormat((0.5, 1.0, 2.0, 4.0, 8.0), (0.0, 0.1, 0.2, 0.3, 0.4)), spatial_factor=2)
PLANS = [ExecutionPlan("fp32", name, 1) for name in TOY.executions]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A file of the toy's, the two rows in place."""
    monkeypatch.setitem(ARCHITECTURES, TOY.name, TOY)
    monkeypatch.setitem(FAMILIES, TOYS.name, TOYS)
    torch.manual_seed(0)
    return write(tmp_path / "toy.safetensors", ToyAutoencoder(ToyConfig(8, 5)).state_dict())


def test_the_toy_is_identified_and_loaded(toy):
    checkpoint = open_checkpoint(toy)
    assert (checkpoint.family, checkpoint.family_source, checkpoint.config) == (TOYS, "checkpoint", ToyConfig(8, 5))
    module = load_autoencoder(checkpoint, torch.float32, CPU)
    assert isinstance(module, ToyAutoencoder)
    assert checkpoint.weight_bytes(torch.float16) == 2 * sum(weight.numel() for weight in module.parameters())


def test_the_toy_runs_whole_and_in_bands(toy):
    checkpoint = open_checkpoint(toy)
    module = load_autoencoder(checkpoint, torch.float32, CPU)
    picture = torch.randint(0, 256, (24, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = []
    for plan in PLANS:
        assert count(network_shape(checkpoint, "decode", 24, 16), plan, CPU) > 24 * 16
        (latent,) = compute.forward(module, [picture], [Task("encode", checkpoint)], plan, lambda: None).arrays
        (again,) = compute.forward(
            module, [torch.tensor(latent)], [Task("decode", checkpoint)], plan, lambda: None
        ).arrays
        made.append((latent, again))
    for latent, again in made[1:]:
        assert latent.shape == (5, 12, 8)
        assert np.allclose(latent, made[0][0], atol=2e-3)
        assert np.abs(again.astype(int) - made[0][1]).max() <= 1
    z = torch.randn(1, 5, 12, 8)
    whole = gather(Whole(), module.decode, z)
    torch.testing.assert_close(gather(Banded("strips", 500), module.decode, z), whole, atol=1e-5, rtol=1e-5)


def test_the_toy_is_converted_and_merged(toy, tmp_path):
    source = open_checkpoint(toy)
    folder = tmp_path / "folder"
    convert(source, Output(folder, "diffusers"))
    assert json.loads((folder / "config.json").read_text()) == {
        "_class_name": "AutoencoderToy", "_family": "toys", "width": 8,
    }  # fmt: skip
    there = open_checkpoint(folder)
    assert (there.family, there.config, there.tensors_sha256) == (TOYS, source.config, source.tensors_sha256)
    back = convert(there, Output(tmp_path / "back.safetensors", "ldm", torch.float16))
    assert open_checkpoint(back).tensors_sha256 == source.tensors_sha256
    mixed = merge(source, there, Blend(contrast=0.5), Output(tmp_path / "mixed.safetensors"))
    state = load_autoencoder(open_checkpoint(mixed), torch.float32, CPU).state_dict()
    ours = load_autoencoder(source, torch.float32, CPU).state_dict()
    torch.testing.assert_close(state["decoder.head.weight"], ours["decoder.head.weight"] * 0.5)
    torch.testing.assert_close(state["encoder.head.weight"], ours["encoder.head.weight"])


def test_the_toy_takes_nothing_from_the_others(toy):
    for family in ("sd1", "taesd"):
        for shapes in (state_of(family), as_diffusers(state_of(family))):
            assert told({key: tuple(value.shape) for key, value in shapes.items()}) is not TOY
