"""Photographs that are there without a network: those in scikit-image's own wheel, all free of rights."""

import numpy as np
import numpy.typing as npt
from PIL import Image

NAMES = ("astronaut", "coffee", "chelsea", "rocket", "colorwheel", "hubble_deep_field", "immunohistochemistry")
"""NASA's, CC0 or public domain: skimage.data says of each where it is from. The wheel of colours is no photograph."""


def photographs(side: int) -> list[npt.NDArray[np.uint8]]:
    """uint8 (side, side, 3): the middle of each, made so large that its shorter side fits. Blocking."""
    from skimage import data

    return [_square(getattr(data, name)()[..., :3], side) for name in NAMES]


def _square(picture: np.ndarray, side: int) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(picture)
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    return np.array(image.resize((side, side), Image.Resampling.LANCZOS, box=box))
