import io

import numpy as np
import pytest
from PIL import Image

from app.errors import MalformedBody, TooLarge
from app.tools.buckets import parse_buckets
from app.tools.pictures import Wish, ready, weight
from app.wire.headers import read_header
from tests.service import picture, pixels

BUCKETS = parse_buckets("64x64:16:32-128")


def opened(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


def test_where_nothing_is_asked_for_the_file_goes_as_it_is():
    sent = ready(picture(33, 31), Wish(), 10**6)
    assert (sent.bodies, sent.pixels, sent.cut) == ([picture(33, 31)], 33 * 31, None)
    assert weight(read_header(picture()), Wish()) == 0


def test_a_twin_is_mirrored():
    sent = ready(picture(40, 24), Wish(flip=True), 10**6)
    assert np.array_equal(opened(sent.bodies[0]), pixels(40, 24))
    assert np.array_equal(opened(sent.bodies[1]), pixels(40, 24)[:, ::-1])
    assert (sent.pixels, sent.cut) == (2 * 40 * 24, None)


def test_a_bucket_s_size_is_sent_and_counted():
    wish = Wish(BUCKETS, flip=True)
    sent = ready(picture(200, 100), wish, 10**6)
    assert [opened(body).shape for body in sent.bodies] == [(48, 80, 3)] * 2
    assert np.array_equal(opened(sent.bodies[0])[:, ::-1], opened(sent.bodies[1]))
    assert weight(read_header(picture(200, 100)), wish) == 2 * 3 * 80 * 48
    assert wish.size(read_header(picture(200, 100))) == (80, 48)


def lying() -> bytes:
    """40 x 24 as stored, 24 x 40 as shown."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels(40, 24)).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_kohya_takes_pictures_as_they_are_stored():
    assert Wish().size(read_header(lying())) == (24, 40)
    wish = Wish(BUCKETS, form="kohya")
    sent = ready(lying(), wish, 10**6)
    assert sent.cut is not None
    assert sent.cut.original == (40, 24)
    assert Wish(BUCKETS).size(read_header(lying())) == sent.cut.bucket[::-1]


def test_what_cannot_be_read_is_refused():
    with pytest.raises(MalformedBody):
        ready(picture(200, 100)[:-100], Wish(BUCKETS), 10**6)
    with pytest.raises(TooLarge):
        ready(picture(200, 100), Wish(BUCKETS), 100)


def test_the_manifest_is_told_what_was_asked_for_and_no_more():
    assert Wish().options == {}
    assert Wish(BUCKETS, True, "kohya").options == {"buckets": "64x64:16:32-128", "flip": True, "format": "kohya"}
