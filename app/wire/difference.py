"""How a picture differs from its original: PSNR, SSIM, and the mean shifts of luminance, saturation and hue."""

import cmath
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""(H, W, 3) in sRGB."""

WINDOW = 7
"""Pixels a side of SSIM's window: scikit-image's default, of which `HALO` is the half."""
HALO = WINDOW // 2

BAND_PIXELS = 1 << 20
"""Pixels that are measured at once: float64 copies of a large picture would take gigabytes."""

COLOURLESS = 1.0
"""Mean product of the chromas below which hue says nothing: a chroma of 1 is about what an eye can tell from grey."""


@dataclass(frozen=True)
class Difference:
    """What became of a picture. Shifts are the picture minus its original."""

    psnr: float
    """Peak signal-to-noise ratio in dB, 10 log10(255² / MSE) over all values in 8 bits; infinite for equal pictures."""
    ssim: float
    """Mean structural similarity over windows of 7x7 pixels and the three channels; 1 for equal pictures.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), 2004, as
    scikit-image computes it by default. Sides of less than 7 pixels are extended by repeating the edge.
    """
    luminance: float
    """Mean shift of CIELAB lightness L*: 0 is black, 100 white; above 0 the picture came out lighter."""
    saturation: float
    """Mean shift of CIELAB chroma C* = √(a*² + b*²): 0 is grey, about 130 the most vivid sRGB; below 0: paler.

    Chroma and not HSV's saturation, which is as high in nearly black pixels as in vivid ones.
    """
    hue: float
    """Mean turn of the CIELAB hue angle in degrees, in (-180, 180]; above 0 it went from red towards yellow.

    The angle of Σ (a₀ - i b₀)(a₁ + i b₁) over the pixels: the circular mean of their differences, each weighted by the
    product of its two chromas, since a nearly grey pixel has no hue to speak of. 0 where both pictures are colourless.
    """


def difference(original: Picture, picture: Picture) -> Difference:
    """Measures two pictures of one size. CIELAB is that of scikit-image: sRGB, D65, 2° observer (CIE 15).

    Raises ValueError where the sizes differ: the caller crops padding away first.
    """
    from skimage.color import rgb2lab  # slow to import, and only needed here
    from skimage.metrics import structural_similarity

    if original.shape != picture.shape:
        raise ValueError(f"expected two pictures of one size, got {original.shape} and {picture.shape}")
    before, after = _extended(original), _extended(picture)
    similar = 0.0
    for band in _bands(before, HALO):
        mean = structural_similarity(before[band], after[band], win_size=WINDOW, channel_axis=-1, data_range=255)
        similar += float(mean) * (band.stop - band.start - 2 * HALO) / (len(before) - 2 * HALO)
    squares = luminance = saturation = 0.0
    turn = 0j
    for band in _bands(original, 0):
        squares += float(np.sum((original[band].astype(np.float64) - picture[band]) ** 2))
        lab, lab_after = rgb2lab(original[band]), rgb2lab(picture[band])
        luminance += float(np.sum(lab_after[..., 0] - lab[..., 0]))
        colour, colour_after = _plane(lab), _plane(lab_after)
        saturation += float(np.sum(np.abs(colour_after) - np.abs(colour)))
        turn += complex(np.sum(colour.conj() * colour_after))
    pixels = original.size // 3
    return Difference(
        psnr=10 * math.log10(255**2 * original.size / squares) if squares else math.inf,
        ssim=similar,
        luminance=luminance / pixels,
        saturation=saturation / pixels,
        hue=_degrees(turn) if abs(turn) / pixels >= COLOURLESS else 0.0,
    )


def _bands(picture: Picture, halo: int) -> Iterator[slice]:
    """Rows to read at once: they tile the rows that have `halo` rows on either side, and bring those along."""
    height, width, _ = picture.shape
    rows = max(1, BAND_PIXELS // width)
    for start in range(halo, height - halo, rows):
        yield slice(start - halo, min(start + rows, height - halo) + halo)


def _extended(picture: Picture) -> Picture:
    height, width, _ = picture.shape
    more = ((0, max(0, WINDOW - height)), (0, max(0, WINDOW - width)), (0, 0))
    return np.pad(picture, more, mode="edge")


def _plane(lab: npt.NDArray[np.float64]) -> npt.NDArray[np.complex128]:
    """a* + i b*: its modulus is the chroma, its angle the hue."""
    return lab[..., 1] + 1j * lab[..., 2]


def _degrees(turn: complex) -> float:
    angle = math.degrees(cmath.phase(turn))
    return 180.0 if angle == -180 else angle
