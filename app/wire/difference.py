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
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""SSIM's constants against small denominators, of the paper named below."""

LIGHT = np.array([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.arange(256) / 255])
"""What the bytes of sRGB are of the light of a screen (IEC 61966-2-1)."""
XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
"""CIE XYZ of linear sRGB (ITU-R BT.709), one row each."""
WHITE = np.array([0.95047, 1.0, 1.08883])
"""XYZ of D65, as the 2° observer sees it."""

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

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), 2004, with
    sample covariances, as scikit-image computes it by default. Sides of less than 7 pixels are extended by repeating
    the edge.
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
    """Measures two pictures of one size.

    Raises ValueError where the sizes differ: the caller crops padding away first.
    """
    if original.shape != picture.shape:
        raise ValueError(f"expected two pictures of one size, got {original.shape} and {picture.shape}")
    before, after = _extended(original), _extended(picture)
    similar = 0.0
    for band in _bands(before, HALO):
        mean = similarity(before[band], after[band])
        similar += mean * (band.stop - band.start - 2 * HALO) / (len(before) - 2 * HALO)
    squares = luminance = saturation = 0.0
    turn = 0j
    for band in _bands(original, 0):
        squares += float(np.sum((original[band].astype(np.float64) - picture[band]) ** 2))
        lab, lab_after = cielab(original[band]), cielab(picture[band])
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


def similarity(original: Picture, picture: Picture) -> float:
    """Mean SSIM over the whole windows and the three channels."""
    x, y = original.astype(np.float64), picture.astype(np.float64)
    mean_x, mean_y = _windows(x), _windows(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y = sample * (_windows(x * x) - mean_x**2), sample * (_windows(y * y) - mean_y**2)
    covariance = sample * (_windows(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return float(np.mean(luminance * (2 * covariance + C2) / (var_x + var_y + C2)))


def cielab(picture: Picture) -> npt.NDArray[np.float64]:
    """L*, a* and b* of each pixel (CIE 15)."""
    t = LIGHT[picture] @ (XYZ.T / WHITE)
    x, y, z = np.moveaxis(np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _windows(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of each whole window of (H, W, 3)."""
    rows, columns = values.shape[0] - 2 * HALO, values.shape[1] - 2 * HALO
    across = values[:, :columns].copy()
    for at in range(1, WINDOW):
        across += values[:, at : at + columns]
    down = across[:rows].copy()
    for at in range(1, WINDOW):
        down += across[at : at + rows]
    return down / WINDOW**2


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
