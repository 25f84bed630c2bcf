"""Small random autoencoders of every family, and the file forms that users keep theirs in."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.vae.architectures import Architecture, architecture_of, told
from app.vae.autoencoder import Autoencoder, Config
from app.vae.autoencoder_dc import DCConfig, DCHalf
from app.vae.autoencoder_hunyuan import HunyuanConfig
from app.vae.autoencoder_kl import KLConfig
from app.vae.autoencoder_tiny import TinyConfig, TinyLayer
from app.vae.autoencoder_wan import WanConfig
from app.vae.autoencoder_wan22 import PATCHED, QwenImage21Config, Wan22Config, patched_picture_tensors
from app.vae.families import FAMILIES
from app.weights.parts import whole_of

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
WIDTH = 32  # of every level: the default of 32 norm groups divides it


def kl_config(family: str = "sd1", **changes: Any) -> KLConfig:
    row = FAMILIES[family]
    quant = family not in {"sd3", "flux"}
    options: dict[str, Any] = {
        "encoder_widths": (WIDTH,) * 4,
        "decoder_widths": (WIDTH,) * 4,
        "encoder_depth": 1,
        "decoder_depth": 2,
        "latent_channels": row.latent_channels,
        "quant_conv": quant,
        "post_quant_conv": quant,
        "batch_norm": row.latent_format.statistics,
    }
    return KLConfig(**(options | changes))


def tiny_config(family: str = "taesd", width: int = 4) -> TinyConfig:
    """TAESD's layers, or the f32 variant's, one block a stage."""
    row = FAMILIES[family]
    pool, z, w = family == "taef2", row.latent_channels, width
    encoder = [TinyLayer(0, 3, w), TinyLayer(1, w, w, block=True)]
    if row.spatial_factor == 32:
        encoder = [TinyLayer(0, 3, w, stride=2, relu=True), TinyLayer(2, w, w, stride=2, relu=True)]
        encoder.append(TinyLayer(4, w, w, block=True))
    for level in range(3):
        after = encoder[-1].index + 1
        encoder.append(TinyLayer(after, w, w, bias=False, stride=2))
        encoder.append(TinyLayer(after + 1, w, w, block=True, pool=pool and level == 2))
    encoder.append(TinyLayer(encoder[-1].index + 1, w, z))
    decoder = [TinyLayer(1, z, w, relu=True), TinyLayer(3, w, w, block=True, pool=pool)]
    while 1 << sum(layer.up for layer in decoder) < row.spatial_factor:
        after = decoder[-1].index + 2
        decoder += [TinyLayer(after, w, w, bias=False, up=True), TinyLayer(after + 1, w, w, block=True)]
    decoder.append(TinyLayer(decoder[-1].index + 1, w, 3))
    return TinyConfig(tuple(encoder), tuple(decoder))


def wan_config(family: str = "wan21", width: int = 4, pixel_channels: int = 3) -> WanConfig:
    return WanConfig(width, width, FAMILIES[family].latent_channels, pixel_channels)


def dc_config(family: str = "sana", width: int = 16) -> DCConfig:
    """Six levels, of which the coarsest attend."""
    width = max(width, FAMILIES[family].latent_channels)
    half = DCHalf((width,) * 6, (1,) * 6, ("res",) * 4 + ("vit",) * 2, (0, 0, 0, 0, 0, 5), False, 8)
    return DCConfig(half, replace(half, kernels=(0, 0, 0, 0, 5, 5)), FAMILIES[family].latent_channels)


def hunyuan_config(family: str = "hunyuanimage", width: int = WIDTH) -> HunyuanConfig:
    """Six levels; the coarsest have channels enough for the means that make a latent."""
    latent = FAMILIES[family].latent_channels
    return HunyuanConfig((width,) * 4 + (2 * width, max(4 * width, 2 * latent)), 1, 2, latent)


def wan22_config(family: str = "wan22", width: int = 4) -> Wan22Config:
    return Wan22Config(width, width, FAMILIES[family].latent_channels)


def qwen21_config(family: str = "qwenimage21", width: int = 4) -> QwenImage21Config:
    return QwenImage21Config(width, width, FAMILIES[family].latent_channels, 4, flat=True)


CONFIGS: dict[str, Callable[..., Config]] = {
    "kl": kl_config,
    "tiny": tiny_config,
    "wan21": wan_config,
    "dc": dc_config,
    "hunyuan": hunyuan_config,
    "wan22": wan22_config,
    "qwenimage21": qwen21_config,
}


def config_of(family: str, **changes: Any) -> Config:
    return CONFIGS[FAMILIES[family].architecture](family, **changes)


def module_of(family: str = "sd1", seed: int = 0, **changes: Any) -> Autoencoder:
    """A random network; the same weights for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    config = config_of(family, **changes)
    module = architecture_of(config).module(config)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    if module.bn is not None:
        module.bn.running_var = torch.rand(module.bn.num_features, generator=generator) + 0.5
    return module.eval()


def state_of(family: str = "sd1", seed: int = 0, **changes: Any) -> State:
    """A random state dict as a file has it, with canonical names."""
    return as_published(module_of(family, seed, **changes).state_dict())


def as_published(state: Mapping[str, Tensor]) -> State:
    """What a file of the publisher's has of the same network."""
    state = canonical(state)
    return {
        key: torch.cat([state[name] for name in names]) if len(names) > 1 else state[key]
        for key, names in whole_of(state, told_of_state(state)).items()
    }


def canonical(state: Mapping[str, Tensor]) -> State:
    """The canonical tensors of such a file; of Wan's they are more than the network's."""
    return _of_clips(state) if "decoder.middle.1.q.weight" in state else dict(state)


def _of_clips(state: Mapping[str, Tensor]) -> State:
    """Kernels of three taps, and layers between frames; of Wan 2.2 the channels of patches in the publisher's order."""
    found: State = {}
    flat = "encoder.downsamples.4.downsamples.0.residual.2.weight" in state  # Qwen-Image 2.1
    if not flat and "encoder.downsamples.0.downsamples.0.residual.2.weight" in state:
        state = {name: turned for name in PATCHED for _, turned in patched_picture_tensors(name, state[name])} | {
            name: value for name, value in state.items() if name not in PATCHED
        }
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if ".middle.1." in name:
            block, _, layer = stem.rpartition(".")
            if layer == "q":
                found[f"{block}.to_qkv.{kind}"] = torch.cat([state[f"{block}.{part}.{kind}"] for part in "qkv"])
            elif layer not in ("k", "v"):
                found[f"{block}.{layer.replace('proj_out', 'proj')}.{kind}"] = value
        elif value.dim() == 4 and ".resample." not in name and not flat:
            taps = 2 if value.shape[-1] == 3 else 0
            found[name] = torch.cat([torch.randn(*value.shape[:2], taps, *value.shape[2:]), value[:, :, None]], dim=2)
        else:
            found[name] = value[..., None] if kind == "gamma" else value
    resampling = [name.partition(".resample.")[0] for name in state if name.endswith(".resample.1.weight")]
    down, up = ([name for name in resampling if name.startswith(half)] for half in ("encoder", "decoder"))
    for blocks, factor in ((down[1:], 1), (up[:-1], 2)):  # the finest level has as many frames as the picture
        for block in blocks:
            found |= _between_frames(block, state[f"{block}.resample.1.weight"].shape[1], factor, 1 if flat else 3)
    return found


def _between_frames(block: str, channels: int, factor: int, taps: int) -> State:
    weight = torch.randn(factor * channels, channels, *([taps] if taps > 1 else []), 1, 1)
    return {f"{block}.time_conv.weight": weight, f"{block}.time_conv.bias": torch.randn(factor * channels)}


def told_of_state(state: Mapping[str, Tensor]) -> Architecture:
    return told({key: tuple(value.shape) for key, value in state.items()})


def as_diffusers(state: Mapping[str, Tensor]) -> State:
    """The same tensors as diffusers saves them: its names, attention as linear layers."""
    row = told_of_state(state)
    if row.parts is not None:
        whole, ends = row.parts
        for key in [key for key in state if key.endswith(whole)]:
            thirds = state[key].chunk(len(ends))
            state = {name: value for name, value in state.items() if name != key}
            state |= {key.removesuffix(whole) + end: value for end, value in zip(ends, thirds, strict=True)}
    theirs = row.diffusers
    keys = theirs.keys(state)
    return {keys[name]: value.reshape(theirs.shape(name, tuple(value.shape))) for name, value in state.items()}


def under(prefix: str) -> Callable[[Mapping[str, Tensor]], State]:
    """Puts a prefix before every key."""
    return lambda state: {prefix + key: value for key, value in state.items()}


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Saves a state dict in the form that the suffix says; a .ckpt has it one level down, as training left it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path, metadata)
    elif path.suffix == ".ckpt":
        torch.save({"epoch": 3, "state_dict": dict(state)}, path)
    else:
        torch.save(dict(state), path, _use_new_zipfile_serialization=path.suffix != ".bin")  # .bin: the older form
    return path


def sparse(path: Path, shapes: Mapping[str, Sequence[int]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of these shapes, all of it a hole."""
    end = 0
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    for key, shape in shapes.items():
        header[key] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + math.prod(shape)]}
        end += math.prod(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def write_folder(
    folder: Path, state: Mapping[str, Tensor], config: Mapping[str, object], name: str = "diffusion_pytorch_model"
) -> Path:
    """A diffusers folder."""
    write(folder / f"{name}.safetensors", as_diffusers(state))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
