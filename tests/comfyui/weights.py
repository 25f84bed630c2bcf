"""Random weights of the published widths, which are all that ComfyUI reads, in a `models` folder for both programs."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.vae.architectures import architecture_of
from app.vae.autoencoder import Config
from app.vae.autoencoder_kl import KLConfig
from app.vae.autoencoder_tiny import TinyConfig, TinyLayer
from app.vae.autoencoder_wan import WanConfig
from app.vae.families import FAMILIES
from tests.store.weights import as_published

WIDTHS = (128, 256, 512, 512)
TINY_WIDTH = 64
WAN_WIDTH = 32  # ComfyUI reads it off the file, as latentd does; published is 96


def write_models(models: Path) -> None:
    """The first four in vae; `taesd`, `taef2` in vae_approx, where both programs make one of two halves."""
    vae, approx = models / "vae", models / "vae_approx"
    vae.mkdir(parents=True)
    approx.mkdir()
    for seed, family in enumerate(("sd1", "flux", "flux2")):
        _write(vae, family, _random(_kl(family), seed))
    _write(vae, "wan21", as_published(_random(WanConfig(WAN_WIDTH, WAN_WIDTH, FAMILIES["wan21"].latent_channels), 3)))
    for seed, family in enumerate(("taesd", "taef2")):
        tiny = _random(_tiny(family), seed)
        for half in ("encoder", "decoder"):
            _write(approx, f"{family}_{half}", {k[len(half) + 1 :]: v for k, v in tiny.items() if k.startswith(half)})


def _kl(family: str) -> KLConfig:
    row = FAMILIES[family]
    quant = family != "flux"
    return KLConfig(WIDTHS, WIDTHS, 2, 3, row.latent_channels, quant, quant, batch_norm=row.latent_format.statistics)


def _tiny(family: str) -> TinyConfig:
    """TAESD's layers; the lowest blocks of TAEF2 pool."""
    z, w, pool = FAMILIES[family].latent_channels, TINY_WIDTH, family == "taef2"
    encoder = [TinyLayer(0, 3, w), TinyLayer(1, w, w, block=True)]
    decoder = [TinyLayer(1, z, w, relu=True)]
    decoder += [TinyLayer(index, w, w, block=True, pool=pool) for index in (3, 4, 5)]
    for down, up in ((2, 7), (6, 12), (10, 17)):
        encoder.append(TinyLayer(down, w, w, bias=False, stride=2))
        encoder += [TinyLayer(down + i, w, w, block=True, pool=pool and down == 10) for i in (1, 2, 3)]
        decoder.append(TinyLayer(up, w, w, bias=False, up=True))
        decoder += [TinyLayer(up + i, w, w, block=True) for i in ((1,) if up == 17 else (1, 2, 3))]
    return TinyConfig((*encoder, TinyLayer(14, w, z)), (*decoder, TinyLayer(19, w, 3)))


def _random(config: Config, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    module = architecture_of(config).module(config)
    if module.bn is not None:
        module.bn.running_mean = torch.randn(module.bn.num_features) * 0.1
        module.bn.running_var = torch.rand(module.bn.num_features) + 0.5
    return module.state_dict()


def _write(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """In float16: both programs compute in float32 on a CPU, and the disk has half to do."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    save_file(half, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"family": name.removesuffix("_encoder").removesuffix("_decoder")}))
