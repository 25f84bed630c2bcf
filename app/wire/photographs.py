"""Photographs that are there without a network, each the middle of one in scikit-image's wheel, all free of rights."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

FOLDER = Path(__file__).parent / "pictures"
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "colorwheel", "hubble_deep_field", "immunohistochemistry")
"""NASA's, CC0 or public domain: skimage.data says of each where it is from. The wheel of colours is no photograph."""


def photographs(side: int) -> list[npt.NDArray[np.uint8]]:
    """uint8 (side, side, 3), resized from the 256 pixels that there are. Blocking."""
    found = []
    for name in NAMES:
        with Image.open(FOLDER / f"{name}.webp") as image:
            found.append(np.array(image.resize((side, side), Image.Resampling.LANCZOS)))
    return found
