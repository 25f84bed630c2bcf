"""The families: one row each, with the constants that no weight file holds. To add a family, add a row.

Sources of the constants: CompVis v1-inference.yaml (0.18215), generative-models sd_xl_base.yaml (0.13025), the
diffusers configs of SD3 (1.5305, 0.0609), FLUX.1 (0.3611, 0.1159), FLUX.2 (BatchNorm over 2x2 patches), Sana
(0.41407), HunyuanImage 2.1 (0.75289) and of both Wan 2.1 and Qwen-Image (the same mean and deviation per channel),
github.com/madebyollin/taesd (tiny autoencoders: pixels in [0, 1], latents as the diffusion model sees them).
"""

from dataclasses import dataclass, field
from typing import Any

from app.terms import Convention
from app.vae.latent_format import LatentFormat, per_channel

USUAL = (0.3, 2.5)
"""Scaled latents: the least root mean square about 0, and the greatest standard deviation within a channel.

A diffusion model's latents are scaled to about unit variance. The figures are set so that no picture passes them by
itself: 21 pictures, among them flat colours, noise and a chessboard, came to 0.46 and more (the flat ones, which
are small by nature, aside) and to 1.15 and less with latentd-small, to 0.53 and 1.0 with TAEF2. Raw latents
taken for scaled ones come to about 1 / scaling_factor (SD 1.x 5.5, SDXL 7.7, FLUX.1 2.8), scaled ones scaled again to
scaling_factor (0.18, 0.13, 0.36). SD3's factor of 1.5305 is too near to 1 to show.
"""
NEAR = (0.4, 2.0)  # the same for FLUX.1 and Sana, whose scaling factors are nearer to 1
WAN_USUAL = (0.3, 1.6)
"""Of Wan's: the 16 frames of a real clip came to 0.60 to 0.98 and to 0.49 to 0.90; as raw latents to 1.0 to 2.0."""


@dataclass(frozen=True)
class Family:
    """What a diffusion model and its VAE agree on."""

    name: str
    architecture: str  # a row of ARCHITECTURES
    latent_channels: int  # of raw latents
    latent_format: LatentFormat = LatentFormat()
    spatial_factor: int = 8  # pixels per raw latent position
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    by_name: bool = False  # only where a file names it: neither shapes nor constants lead here
    # The four below tell nothing about which family weights are of, so rows that differ in them alone are equal.
    space: str = field(default="", compare=False)  # the diffusion models' latent space, by its first family's name
    usual: tuple[float, float] = field(default=USUAL, compare=False)
    # What sd-scripts keeps in its caches: what the VAE's `encode` returns there, which scales for FLUX.1 alone.
    # None: the raw latents of another network, which this one does not take.
    cached: Convention | None = field(default="raw", compare=False)
    # A request that names no model means one of these only where there is nothing else.
    demonstration: bool = field(default=False, compare=False)

    @property
    def size_multiple(self) -> int:
        """Pictures are padded to multiples of this many pixels, so that packed latents come out whole."""
        return self.side("scaled")

    def side(self, convention: Convention) -> int:
        """Pixels per latent position along one side."""
        return self.spatial_factor * (self.latent_format.patch if convention == "scaled" else 1)

    def channels(self, convention: Convention) -> int:
        """Channels of a latent."""
        return self.latent_channels * (self.latent_format.patch**2 if convention == "scaled" else 1)


def _kl(name: str, channels: int, latent_format: LatentFormat, space: str, **more: Any) -> Family:
    return Family(name, "kl", channels, latent_format, space=space, **more)


def _tiny(
    name: str, channels: int, space: str, *, patch: int = 1, cached: Convention | None = None, **more: Any
) -> Family:
    form = LatentFormat(patch=patch)
    return Family(name, "tiny", channels, form, pixel_range=(0.0, 1.0), space=space, cached=cached, **more)


def _other(name: str, architecture: str, channels: int, latent_format: LatentFormat, **more: Any) -> Family:
    """A family with a network and a space of its own, 32 pixels to a position, that sd-scripts keeps nothing of."""
    return Family(name, architecture, channels, latent_format, 32, space=name, cached=None, **more)


WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        _kl("sd1", 4, LatentFormat(0.18215), "sd1"),
        _kl("sd2", 4, LatentFormat(0.18215), "sd1"),
        _kl("sdxl", 4, LatentFormat(0.13025), "sdxl"),
        _kl("sd3", 16, LatentFormat(1.5305, 0.0609), "sd3"),
        _kl("flux", 16, LatentFormat(0.3611, 0.1159), "flux", usual=NEAR, cached="scaled"),
        _kl("flux2", 32, LatentFormat(patch=2, statistics=True), "flux2"),
        Family("wan21", "wan21", 16, per_channel(WAN_MEAN, WAN_STD), space="wan21", usual=WAN_USUAL, cached=None),
        _kl("latentd-small", 4, LatentFormat(), "latentd-small", by_name=True, demonstration=True),
        _other("sana", "dc", 32, LatentFormat(0.41407), usual=NEAR),
        _other("hunyuanimage", "hunyuan", 64, LatentFormat(0.75289)),
        _tiny("taesd", 4, "sd1"),
        _tiny("taesdxl", 4, "sdxl"),
        _tiny("taesd3", 16, "sd3"),
        _tiny("taef1", 16, "flux", usual=NEAR, cached="scaled"),
        _tiny("taef2", 32, "flux2", patch=2),
        _tiny("taesana", 32, "sana", spatial_factor=32),
    )
}


def shows(tiny: Family, full: Family) -> bool:
    """Whether a family is a tiny autoencoder that decodes the scaled latents of another, or its own."""
    return tiny.architecture == "tiny" and takes(tiny.name, full.name, "scaled")


def takes(family: str, latents_of: str, convention: Convention) -> bool:
    """Whether a VAE of one family decodes latents of another, both by name, to what they are meant to be.

    Families of one latent space with the same constants do (SD 1.x and 2.x); and a tiny autoencoder, which is made to
    show them, takes the scaled latents of its full one. Not the other way round: what a tiny encoder makes of a
    picture comes near those latents, and a full decoder shows the difference.
    """
    if family == latents_of:
        return True
    model, latents = FAMILIES.get(family), FAMILIES.get(latents_of)
    if model is None or latents is None or model.space != latents.space:
        return False
    same = (model.architecture, model.latent_format) == (latents.architecture, latents.latent_format)
    return same or (convention == "scaled" and model.architecture == "tiny")
