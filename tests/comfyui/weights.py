"""Random weights of the published widths, which are all that ComfyUI reads, in a `models` folder for both programs."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.vae.architectures import architecture_of
from app.vae.autoencoder_kl import KLConfig
from app.vae.families import FAMILIES
from benchmarks.peer import ours, peer

WIDTHS = (128, 256, 512, 512)


def write_models(models: Path) -> None:
    """`sd1`, `flux` and `flux2` in vae, `taesd` in vae_approx, where ComfyUI makes one of its two halves."""
    vae, approx = models / "vae", models / "vae_approx"
    vae.mkdir(parents=True)
    approx.mkdir()
    for seed, family in enumerate(("sd1", "flux", "flux2")):
        _write(vae, family, _kl(family, seed))
    tiny = ours("tiny", peer("tiny")).state_dict()
    for half in ("encoder", "decoder"):
        _write(approx, f"taesd_{half}", {k[len(half) + 1 :]: v for k, v in tiny.items() if k.startswith(half)})


def _kl(family: str, seed: int) -> dict[str, torch.Tensor]:
    row = FAMILIES[family]
    quant = family != "flux"
    config = KLConfig(WIDTHS, WIDTHS, 2, 3, row.latent_channels, quant, quant, batch_norm=row.latent_format.statistics)
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
