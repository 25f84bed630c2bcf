import struct

import numpy as np
import pytest
from PIL import Image

from app.wire.colour import check_colour, curve, display_p3, gamma_of, profile_of
from app.wire.png import write_png
from tests.wire.test_images import chunk, noise, p3_in_srgb, read, saved, smooth, with_chunk


def gama(value):
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def srgb_of_light(light):
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def test_light_becomes_srgb():
    pixels = read(with_chunk(saved(smooth()), gama(1.0)))
    np.testing.assert_allclose(pixels, srgb_of_light(smooth() / 255), atol=0.5)


def test_grey_light_of_16_bits_keeps_its_darks():
    grey = np.arange(0, 2000, 10, np.uint16)[None]
    pixels = read(with_chunk(saved(grey), gama(1.0)))
    np.testing.assert_allclose(pixels[..., 0], srgb_of_light(grey / 65535), atol=0.5)
    assert len(np.unique(pixels)) > 30  # of 8 bits of light, 8 would be left


def test_gamma_leaves_alpha_alone():
    pixels = np.dstack([smooth(), np.full((40, 56), 128, np.uint8)])
    plain, changed = (read(body) for body in (saved(pixels), with_chunk(saved(pixels), gama(1.0))))
    assert (changed > plain).any()
    opaque = read(with_chunk(saved(smooth()), gama(1.0))).astype(int)
    background = np.array((200, 0, 100))
    np.testing.assert_allclose(changed, opaque * 128 / 255 + background * 127 / 255, atol=1)


@pytest.mark.parametrize("value", [0.45455, 0.44, 0.47, 0.0, 0.05, 11])
def test_gamma_that_is_srgbs_or_none_changes_nothing(value):
    np.testing.assert_array_equal(read(with_chunk(saved(noise()), gama(value))), noise())


@pytest.mark.parametrize("said", [chunk(b"sRGB", b"\0"), chunk(b"cICP", bytes([1, 13, 0, 1]))])
def test_gamma_gives_way_to_what_says_more(said):
    np.testing.assert_array_equal(read(with_chunk(saved(noise()), gama(1.0) + said)), noise())


def test_a_palette_has_gamma_too():
    image = Image.fromarray(smooth()).quantize(16)
    pixels = read(with_chunk(saved(image), gama(1.0)))
    np.testing.assert_allclose(pixels, srgb_of_light(np.asarray(image.convert("RGB")) / 255), atol=0.5)


def test_display_p3_of_cicp_becomes_srgb_whatever_the_profile_says():
    said = chunk(b"cICP", bytes([12, 13, 0, 1]))
    np.testing.assert_allclose(read(with_chunk(write_png(smooth()), said)), p3_in_srgb(smooth()), atol=2)
    plain = with_chunk(saved(smooth(), icc_profile=display_p3()), chunk(b"cICP", bytes([1, 13, 0, 1])))
    np.testing.assert_array_equal(read(plain), smooth())


def test_display_p3_of_an_avif_becomes_srgb():
    body = saved(smooth(), "AVIF", quality=100, subsampling="4:4:4")
    assert body.count(b"nclx\0\1")
    read_as_p3 = read(body.replace(b"nclx\0\1", b"nclx\0\x0c"))
    np.testing.assert_allclose(read_as_p3, p3_in_srgb(read(body)), atol=2)
    profiled = saved(smooth(), "AVIF", quality=100, subsampling="4:4:4", icc_profile=display_p3())
    np.testing.assert_allclose(read(profiled), p3_in_srgb(read(body)), atol=2)


@pytest.mark.parametrize("content", [b"", b"\x09", b"\x09\x10\0"])
def test_a_broken_cicp_says_nothing(content):
    check_colour({b"cICP": content}, "PNG")
    np.testing.assert_array_equal(read(with_chunk(saved(noise()), chunk(b"cICP", content))), noise())


def test_what_counts_first():
    assert profile_of({}, b"embedded") == b"embedded"
    assert not profile_of({b"iCCP": b"broken"}, b"embedded")
    assert gamma_of({b"gAMA": (100_000).to_bytes(4)}) == 1.0
    assert gamma_of({b"gAMA": (100_000).to_bytes(4), b"iCCP": b"x"}) is None
    assert curve(1.0, 256)[[0, 255]].tolist() == [0, 255]
