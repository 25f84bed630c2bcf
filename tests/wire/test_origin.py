import numpy as np
import pytest

from app.errors import InvalidImage
from app.wire.fit import fit
from app.wire.origin import (
    Origin,
    contradiction,
    origin_of,
    read_offsets,
    read_origin,
    read_sizes,
    restore,
    restored,
    texts,
)
from tests.service import pixels


@pytest.mark.parametrize(
    ("sizes", "mode", "said"),
    [
        ([(30, 25)], "pad", {"image_size": "30x25", "image_fit": "pad"}),
        ([(30, 25)] * 3, "resize", {"image_size": "30x25", "image_fit": "resize"}),
        ([(30, 25)], "crop", {"image_size": "30x25", "image_fit": "crop", "image_offset": "3,0"}),
        (
            [(30, 25), (31, 27)],
            "crop",
            {"image_size": "30x25, 31x27", "image_fit": "crop", "image_offset": "3,0; 3,1"},
        ),
        ([(30, 25), (31, 25)], "crop", {"image_size": "30x25, 31x25", "image_fit": "crop", "image_offset": "3,0"}),
        ([(32, 24)], "pad", {"image_size": "32x24"}),  # nothing had to change
        ([(32, 24)], "error", {"image_size": "32x24"}),
    ],
)
def test_what_is_said_can_be_read(sizes, mode, said):
    origin = origin_of(sizes, 8, mode)
    assert texts(origin) == said
    again = read_origin(said)
    assert again is not None
    assert texts(again) == said
    for index in range(len(sizes)):
        assert (again.size(index), again.offset(index)) == (origin.size(index), origin.offset(index))


def test_what_fit_refuses_has_no_origin():
    with pytest.raises(InvalidImage):
        origin_of([(30, 25)], 8, "error")


@pytest.mark.parametrize("text", ["", "8", "8x", "0x8", "8x8,", "8x8;8x8", "-8x8", "٣x٣", "99999999x1", "8x8 8x8"])
def test_what_is_no_size(text):
    assert read_sizes(text) is None


@pytest.mark.parametrize("text", ["", "8", "1x2", "1,2;", "1,2,3,4", "-1,2", "٣,٣", "99999999,1"])
def test_what_is_no_offset(text):
    assert read_offsets(text) is None


def test_a_file_without_a_size_says_nothing():
    assert read_origin({"image_fit": "crop"}) is None


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
@pytest.mark.parametrize("size", [(451, 300), (8, 8), (9, 17)])
def test_every_fit_leads_back(mode, size):
    image = pixels(*size)
    fitted = fit(image, 8, mode)
    decoded = [(fitted.shape[1], fitted.shape[0])]
    origin = origin_of([size], 8, mode)
    assert contradiction(origin, decoded, 8, exactly=True) is None
    result = restored(origin, decoded)
    back = restore(fitted, result.size(0), origin.change)
    assert back.shape[1::-1] == result.size(0)
    (x, y), (width, height) = result.offset(0), result.size(0)
    assert result.size(0) == (size if mode != "crop" else decoded[0])
    np.testing.assert_allclose(
        back.astype(int), image[y : y + height, x : x + width], atol=0 if mode != "resize" else 40
    )


def test_sixteen_bits_are_resized_as_eight_are():
    image = pixels(56, 40)
    eight = restore(image, (61, 43), "resize")
    sixteen = restore(image.astype(np.uint16) * 257, (61, 43), "resize")
    assert sixteen.dtype == np.uint16
    np.testing.assert_allclose(sixteen / 257, eight, atol=1.5)


@pytest.mark.parametrize(
    ("origin", "exactly", "reason"),
    [
        (Origin(((33, 32),)), False, "33x32 is larger than the picture, 32x32"),
        (Origin(((8, 8),)), False, None),  # cut to it
        (Origin(((8, 8),)), True, "fit=pad makes 8x8 of 8x8"),  # an enlarged latent, say
        (Origin(((25, 31),)), True, None),
        (Origin(((28, 35),), "resize"), False, None),
        (Origin(((20, 32),), "resize"), False, "fit=resize makes 24x32 of 20x32, the picture has 32x32"),
        (Origin(((33, 39),), "crop"), False, None),
        (Origin(((33, 39),), "crop", ((1, 7),)), False, None),
        (Origin(((33, 39),), "crop", ((2, 0),)), False, "32x32 from 2,0 on are not inside of 33x39"),
        (Origin(((7, 32),), "crop"), False, "no 8x8 pixels to crop to"),
        (Origin(((30, 30), (31, 31))), False, "2 sizes for 1 pictures"),
        (Origin(((33, 39),), "crop", ((0, 0), (1, 0))), False, "2 offsets for 1 pictures"),
    ],
)
def test_what_cannot_be_is_told(origin, exactly, reason):
    told = contradiction(origin, [(32, 32)], 8, exactly=exactly)
    assert (told is None) == (reason is None)
    assert (reason or "") in (told or "")
