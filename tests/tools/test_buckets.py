import numpy as np
import pytest
from PIL import Image

from app.errors import InvalidInput
from app.tools.buckets import Cut, cut_picture, parse_buckets
from tests.service import pixels


def test_the_sizes_are_those_of_sd_scripts():
    """Its make_bucket_resolutions((512, 512)), as it prints them."""
    wide = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    tall = [(height, width) for width, height in wide]
    odd = [(448, 576), (384, 640), (320, 704), (320, 768), (256, 832), (256, 896), (256, 960), (256, 1024)]
    assert parse_buckets("512x512:64").sizes == tuple(sorted({*wide, *tall, *odd}))


@pytest.mark.parametrize(
    ("text", "size", "resized", "bucket", "box"),
    [
        ("512x512:64", (1500, 1000), (640, 427), (640, 384), (0, 21, 640, 405)),
        ("512x512:64", (1000, 1000), (512, 512), (512, 512), (0, 0, 512, 512)),
        ("512x512:64", (640, 384), (640, 384), (640, 384), (0, 0, 640, 384)),
        ("512x512:64", (100, 130), (448, 582), (448, 576), (0, 3, 448, 579)),  # grows
        ("512x512:64", (4000, 1000), (1024, 256), (1024, 256), (0, 0, 1024, 256)),
        ("64x64:16:32-128", (200, 100), (96, 48), (80, 48), (8, 0, 88, 48)),
    ],
)
def test_a_picture_covers_the_bucket_of_the_nearest_aspect(text, size, resized, bucket, box):
    cut = parse_buckets(text).cut(*size)
    assert (cut.resized, cut.bucket, cut.box) == (resized, bucket, box)


@pytest.mark.parametrize(("size", "kernel"), [((500, 300), Image.Resampling.BOX), ((50, 30), Image.Resampling.LANCZOS)])
def test_the_cut_is_what_resizing_all_and_cropping_gives(size, kernel):
    picture, cut = pixels(*size), parse_buckets("128x128:32").cut(*size)
    expected = Image.fromarray(picture).resize(cut.resized, kernel).crop(cut.box)
    result = cut_picture(picture, cut)
    assert result.shape == (cut.bucket[1], cut.bucket[0], 3)
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1


def test_a_picture_of_one_row_is_not_made_a_wall():
    cut = parse_buckets("1024x1024:64").cut(60000, 1)
    assert cut.resized == (60000 * 256, 256)
    assert cut_picture(np.zeros((1, 60000, 3), np.uint8), cut).shape == (256, 1024, 3)


def test_the_centre_is_kept():
    assert Cut((10, 10), (101, 64), (64, 64)).box == (18, 0, 82, 64)


@pytest.mark.parametrize(
    "text",
    [
        *("1024", "1024x1024", "0x0:64", "64x64:4", "64x64:128", "99999x64:64", "-64x64:8", ""),
        *(f"512x512:64:{sides}" for sides in ("600-1024", "100-1024", "640-1024", "256-448", "0-512", "256-65536")),
    ],
)
def test_what_is_no_row_of_buckets_is_refused(text):
    with pytest.raises(InvalidInput, match="buckets"):
        parse_buckets(text)


def test_the_range_of_sides_can_be_given():
    assert max(max(size) for size in parse_buckets("1024x1024:64:256-2048").sizes) == 2048
    assert max(max(size) for size in parse_buckets("1024x1024:64").sizes) == 1024
