"""The families: one row each, with the constants that no weight file holds. To add a family, add a row.

Sources of the constants: CompVis v1-inference.yaml (0.18215), generative-models sd_xl_base.yaml (0.13025), the
diffusers configs of SD3 (1.5305, 0.0609), FLUX.1 (0.3611, 0.1159), FLUX.2 (BatchNorm over 2x2 patches), Sana
(0.41407), HunyuanImage 2.1 (0.75289), of both Wan 2.1 and Qwen-Image (the same mean and deviation per channel), of Wan
2.2 and of Qwen-Image 2.1 (theirs),
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


def _other(
    name: str, architecture: str, channels: int, latent_format: LatentFormat, side: int = 32, **more: Any
) -> Family:
    """A family with a network and a space of its own, that sd-scripts keeps nothing of."""
    return Family(name, architecture, channels, latent_format, side, space=name, cached=None, **more)


WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

WAN22_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN22_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
QWEN21_MEAN = (
    *(0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722),
    *(1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363),
    *(2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464),
    *(-0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955),
    *(-0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376),
    *(-1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729),
    *(-2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505),
    *(0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304),
)
QWEN21_STD = (
    *(3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910),
    *(3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756),
    *(3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489),
    *(3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467),
    *(3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125),
    *(3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875),
    *(3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959),
    *(3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161),
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
        _other("wan22", "wan22", 48, per_channel(WAN22_MEAN, WAN22_STD), 16),
        _other("qwenimage21", "qwenimage21", 64, per_channel(QWEN21_MEAN, QWEN21_STD), 16),
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
