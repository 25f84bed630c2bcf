import numpy as np
import skimage.data
from PIL import Image

from app.wire.photographs import NAMES, photographs


def test_they_are_there_without_a_network_and_square():
    found = photographs(64)
    assert len(found) == len(NAMES)
    for picture in found:
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 5  # none is flat


def test_they_are_those_of_scikit_image():
    """The middle of each, so large that its shorter side fits; to the last bit."""
    for name, found in zip(NAMES, photographs(256), strict=True):
        image = Image.fromarray(getattr(skimage.data, name)()[..., :3])
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        box = (left, top, left + edge, top + edge)
        assert np.array_equal(found, np.array(image.resize((256, 256), Image.Resampling.LANCZOS, box=box)))
