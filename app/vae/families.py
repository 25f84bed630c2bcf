"""The families: one row each, with the constants that no weight file holds. To add a family, add a row.

Sources of the constants: CompVis v1-inference.yaml (0.18215), generative-models sd_xl_base.yaml (0.13025), the
diffusers configs of SD3 (1.5305, 0.0609), FLUX.1 (0.3611, 0.1159) and FLUX.2 (BatchNorm over 2x2 patches),
github.com/madebyollin/taesd (tiny autoencoders: pixels in [0, 1], latents as the diffusion model sees them).
"""

from dataclasses import dataclass
from typing import Literal

from app.vae.latent_format import LatentFormat

Architecture = Literal["kl", "tiny"]


@dataclass(frozen=True)
class Family:
    """What a diffusion model and its VAE agree on."""

    name: str
    architecture: Architecture
    latent_channels: int  # of raw latents
    latent_format: LatentFormat = LatentFormat()
    spatial_factor: int = 8  # pixels per raw latent position
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    by_name: bool = False  # only where a file names it: neither shapes nor constants lead here

    @property
    def size_multiple(self) -> int:
        """Pictures are padded to multiples of this many pixels, so that packed latents come out whole."""
        return self.spatial_factor * self.latent_format.patch


def _kl(name: str, channels: int, latent_format: LatentFormat, *, by_name: bool = False) -> Family:
    return Family(name, "kl", channels, latent_format, by_name=by_name)


def _tiny(name: str, channels: int, *, spatial_factor: int = 8, patch: int = 1) -> Family:
    return Family(name, "tiny", channels, LatentFormat(patch=patch), spatial_factor, pixel_range=(0.0, 1.0))


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        _kl("sd1", 4, LatentFormat(0.18215)),
        _kl("sd2", 4, LatentFormat(0.18215)),
        _kl("sdxl", 4, LatentFormat(0.13025)),
        _kl("sd3", 16, LatentFormat(1.5305, 0.0609)),
        _kl("flux", 16, LatentFormat(0.3611, 0.1159)),
        _kl("flux2", 32, LatentFormat(patch=2, statistics=True)),
        _kl("latentd-small", 4, LatentFormat(), by_name=True),
        _tiny("taesd", 4),
        _tiny("taesdxl", 4),
        _tiny("taesd3", 16),
        _tiny("taef1", 16),
        _tiny("taef2", 32, patch=2),
        _tiny("taesana", 32, spatial_factor=32),
    )
}
