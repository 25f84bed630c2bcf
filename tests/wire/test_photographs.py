import numpy as np

from app.wire.photographs import NAMES, photographs


def test_they_are_there_without_a_network_and_square():
    found = photographs(64)
    assert len(found) == len(NAMES)
    for picture in found:
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 5  # none is flat
