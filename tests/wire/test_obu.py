import pytest

from app.errors import InvalidImage, MalformedBody
from app.wire.avif.obu import MAX_UNITS, read_sequence, read_still
from tests.wire.av1 import FRAME, SEQUENCE, frame, reduced, unit, whole

START = unit(2, b"")  # a temporal delimiter


@pytest.mark.parametrize("bits", [1, 6, 16])
@pytest.mark.parametrize("colour", [None, (12, 13)])
def test_a_still_s_header(bits, colour):
    width, height = 1 << bits, (1 << bits) - 1
    read = read_sequence(reduced(width, height, bits, colour))
    assert (read.width, read.height, read.colour, read.reduced) == (width, height, colour or (2, 2), True)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("points", [1, 32])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("screen", [0, 1, 2])
def test_every_field_before_the_size_and_the_colours_is_passed_over(timed, points, ids, screen):
    read = read_sequence(whole(640, 360, timed=timed, points=points, ids=ids, screen=screen, colour=(9, 16)))
    assert (read.width, read.height, read.colour, read.reduced) == (640, 360, (9, 16), False)
    assert (read.screen_tools, read.id_bits) == (screen, 2 + 1 + 3 if ids else 0)


def test_units_of_every_form():
    sequence = unit(SEQUENCE, reduced(20, 12))
    assert read_still(START + sequence + unit(FRAME, b"", sized=False)).width == 20
    assert read_still(START + unit(SEQUENCE, reduced(20, 12), layer=True) + unit(FRAME, b"x" * 300)).height == 12
    assert read_still(sequence * 3).width == 20  # said again, as streams do
    assert read_still(sequence + b"\x32\xff\xff\xff\xff\xff\xff\xff\xff").width == 20  # a length beyond all measure


def test_two_sizes_are_a_contradiction():
    both = unit(SEQUENCE, reduced(64, 64)) + unit(SEQUENCE, reduced(65536, 65536))
    with pytest.raises(MalformedBody, match="two different sizes"):
        read_still(both)


@pytest.mark.parametrize("kind", [3, 6, 7])
def test_hidden_frames_are_refused(kind):
    with pytest.raises(InvalidImage, match="has 200 frames"):
        read_still(unit(SEQUENCE, reduced(8192, 8192)) + unit(kind, b"\0" * 30) * 199 + unit(FRAME, b""))


@pytest.mark.parametrize("ids", [False, True])
def test_a_frame_of_its_sequence_s_size(ids):
    sequence = unit(SEQUENCE, whole(20, 12, ids=ids))
    assert read_still(sequence + unit(FRAME, frame(ids=ids))).width == 20
    with pytest.raises(InvalidImage, match="states a size beside"):
        read_still(sequence + unit(FRAME, frame(ids=ids, override=1)))


@pytest.mark.parametrize("said", [{"kind": 1}, {"kind": 2}, {"kind": 3}, {"shown": 0}, {"existing": 1}])
def test_frames_that_are_no_still_picture(said):
    with pytest.raises(InvalidImage, match="no key frame that is shown"):
        read_still(unit(SEQUENCE, whole(20, 12)) + unit(FRAME, frame(**said)))


def test_a_number_without_end_is_refused_where_decoders_lose_count():
    assert read_sequence(whole(20, 12, timed=True, zeros=31)).width == 20
    with pytest.raises(MalformedBody, match="too long"):
        read_sequence(whole(20, 12, timed=True, zeros=32))


@pytest.mark.parametrize("data", [b"", START, unit(FRAME, b"x"), unit(5, b"metadata")])
def test_no_sequence_header(data):
    with pytest.raises(MalformedBody, match="no AV1 sequence header"):
        read_still(data)


@pytest.mark.parametrize("length", range(6))
def test_a_header_that_ends_early(length):
    with pytest.raises(MalformedBody, match="ends too early"):
        read_sequence(reduced(20, 12)[:length])


def test_what_is_no_av1():
    with pytest.raises(MalformedBody, match="holds no AV1"):
        read_still(b"\xff" * 100)


def test_units_are_counted():
    with pytest.raises(MalformedBody, match="more than"):
        read_still(unit(SEQUENCE, reduced(20, 12)) + b"\x7a\0" * MAX_UNITS)
