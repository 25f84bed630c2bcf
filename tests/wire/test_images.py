import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import cv2
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageOps

from app.errors import InvalidParameter, MalformedBody, NotAcceptable, TooLarge
from app.wire.headers import read_header
from app.wire.images import flattened, opaque, read_image, write_image
from app.wire.png import write_png

PURPLE = (200, 0, 100)


def noise(height=9, width=14, channels=3, dtype=np.uint8):
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def smooth(height=40, width=56):
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1).astype(np.uint8)


def saved(pixels, kind="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(body, max_pixels=1 << 20):
    return read_image(body, read_header(body), background=PURPLE, max_pixels=max_pixels)


def image_size(body):
    return read_header(body).shown


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def ihdr(width, height, depth=8, colour=2):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def with_chunk(body, extra):
    """The PNG with one more chunk after IHDR."""
    return body[:33] + extra + body[33:]


def with_chunk_before_data(body, extra):
    at = body.index(b"IDAT") - 4
    return body[:at] + extra + body[at:]


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "AVIF"])
def test_equals_pillow(kind):
    body = saved(smooth(), kind)
    pixels = read(body)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(body)).convert("RGB")))
    assert image_size(body) == (56, 40)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True}), ("JPEG", {}), ("AVIF", {})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = saved(smooth(), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    np.testing.assert_array_equal(read(body), np.asarray(upright))
    assert image_size(body) == upright.size


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True})])
def test_first_frame_of_several(kind, options):
    first, second = noise(), 255 - noise()
    body = saved(first, kind, save_all=True, append_images=[Image.fromarray(second)], **options)
    np.testing.assert_array_equal(read(body), first)


def test_photograph_that_holds_a_second_picture():
    body = saved(smooth(), "MPO", save_all=True, append_images=[Image.fromarray(255 - smooth())])
    np.testing.assert_array_equal(read(body), read(saved(smooth(), "JPEG")))


# --------------------------------------------------------------------------------------------------------------- modes


def test_grey():
    grey = noise(channels=1)
    np.testing.assert_array_equal(read(saved(grey)), np.stack([grey] * 3, axis=-1))


def test_black_and_white():
    bits = noise(channels=1) > 127
    np.testing.assert_array_equal(read(saved(bits)), np.stack([255 * bits] * 3, axis=-1))


def test_palette():
    image = Image.fromarray(noise()).quantize(16)
    np.testing.assert_array_equal(read(saved(image)), np.asarray(image.convert("RGB")))


def test_grey_of_16_bits_is_scaled_not_clipped():
    grey = np.array([[0, 128, 129, 256, 32768, 65406, 65535]], np.uint16)
    np.testing.assert_array_equal(read(saved(grey))[0, :, 1], np.round(grey[0] / 257))


def test_colour_of_16_bits_is_scaled():
    np.testing.assert_array_equal(read(write_png(noise().astype(np.uint16) * 257)), noise())


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 60)])
def test_cmyk_jpeg(colour):
    body = saved(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(read(body).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("adobe", [True, False])
@pytest.mark.parametrize("inverted", [True, False])
def test_cmyk_without_adobes_marker_is_what_other_readers_make_of_it(adobe, inverted):
    """Browsers, Pillow and OpenCV take every CMYK JPEG's numbers as inverted, marked or not."""
    inks = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    body = saved(inks if inverted else ImageChops.invert(inks), "JPEG", quality=100)
    at = body.index(b"\xff\xee")
    if not adobe:
        body = body[:at] + body[at + 2 + int.from_bytes(body[at + 2 : at + 4]) :]
    decoded = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    other = decoded[..., ::-1]
    assert np.abs(read(body).astype(int) - other).max() <= 3
    assert (np.abs(read(body).astype(int) - (200, 30, 60)).max() <= 3) == inverted


# --------------------------------------------------------------------------------------------------------------- alpha


def over_purple(pixels, alpha):
    weight = alpha[..., None] / 255
    return np.round(pixels * weight + np.array(PURPLE) * (1 - weight))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True, "exact": True})])
def test_alpha_over_background(kind, options):
    pixels = noise(channels=4)
    np.testing.assert_allclose(
        read(saved(pixels, kind, **options)), over_purple(pixels[..., :3], pixels[..., 3]), atol=1
    )


def test_alpha_at_its_ends_is_exact():
    pixels = noise(channels=4)
    pixels[..., 3] = 255 * (pixels[..., 3] > 127)
    np.testing.assert_array_equal(read(saved(pixels)), over_purple(pixels[..., :3], pixels[..., 3]))


def test_grey_with_alpha():
    pixels = noise(channels=2)
    expected = over_purple(pixels[..., :1].repeat(3, axis=-1), pixels[..., 1])
    np.testing.assert_allclose(read(saved(Image.fromarray(pixels, "LA"))), expected, atol=1)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(noise()).quantize(16)
    index = np.asarray(image)
    alphas = np.full(256, 255)
    alphas[:16] = 255 * (np.arange(16) != 3) if transparency == 3 else list(transparency)
    expected = over_purple(np.asarray(image.convert("RGB")), alphas[index])
    np.testing.assert_allclose(read(saved(image, transparency=transparency)), expected, atol=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_grey(dtype):
    grey = noise(channels=1, dtype=dtype)
    grey[2:4] = key = 77
    pixels = read(saved(grey, transparency=key))
    assert (pixels[2:4] == PURPLE).all()
    assert (pixels[grey != key] != PURPLE).any(axis=-1).all()


@pytest.mark.parametrize("length", [0, 1, 16, 17, 255, 256, 257, 300, 70_000])
def test_more_transparency_than_there_is_palette_is_passed_over(length):
    image = Image.fromarray(noise()).quantize(16)
    pixels = read(with_chunk_before_data(saved(image), chunk(b"tRNS", bytes(length))))
    if length == 16:
        assert (pixels == PURPLE).all()
    elif length > 16:
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 6, 7, 256, 300])
def test_transparency_of_any_length_is_read_or_refused(mode, length):
    image = Image.fromarray(noise(channels=1, dtype=np.uint16)) if mode == "I;16" else Image.new(mode, (9, 14))
    for content in (bytes(length), b"\xff" * length):
        with suppress(MalformedBody):
            read(with_chunk_before_data(saved(image), chunk(b"tRNS", content)))


def test_transparent_colour():
    pixels = noise()
    pixels[2:4] = key = (1, 2, 3)
    expected = np.where((pixels == key).all(axis=-1, keepdims=True), PURPLE, pixels)
    np.testing.assert_array_equal(read(saved(pixels, transparency=key)), expected)


# ------------------------------------------------------------------------------------------------------------- profiles

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def display_p3():
    """The sRGB profile with the primaries of Display P3: its curve is the same."""
    profile = bytearray(SRGB)
    (tags,) = struct.unpack_from(">I", profile, 128)
    for at in range(132, 132 + 12 * tags, 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, at)
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            column = P3_TO_XYZ[:, b"rgb".index(name[0])]
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in column))
    return bytes(profile)


def p3_in_srgb(pixels):
    value = pixels / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ P3_TO_XYZ.T @ np.linalg.inv(SRGB_TO_XYZ).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_srgb_profile_changes_nothing(kind, options):
    body = saved(smooth(), kind, icc_profile=SRGB, **options)
    assert b"ICC" in body or b"iCC" in body
    difference = read(body).astype(int) - read(saved(smooth(), kind, **options))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WebP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_display_p3_becomes_srgb(kind, options):
    pixels = read(saved(smooth(), kind, **options))
    np.testing.assert_allclose(
        read(saved(smooth(), kind, icc_profile=display_p3(), **options)), p3_in_srgb(pixels), atol=2
    )


def test_profile_is_applied_before_the_background():
    pixels = np.dstack([smooth(), np.zeros((40, 56), np.uint8)])
    assert (read(saved(pixels, icc_profile=display_p3())) == PURPLE).all()


def test_grey_file_with_an_rgb_profile():
    grey = noise(channels=1)
    difference = read(saved(grey, icc_profile=display_p3())).astype(int) - grey[..., None]
    assert np.abs(difference).max() <= 1


def broken_profiles():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return {
        "garbage": b"no profile at all",
        "truncated": SRGB[:200],
        "another space": lab,
        "not ascii": SRGB[:16] + b"\xff\xfe\xfd\xfc" + SRGB[20:],
    }


@pytest.mark.parametrize("profile", broken_profiles().values(), ids=broken_profiles())
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "AVIF"])
def test_broken_profile_is_ignored(kind, profile):
    options = {"lossless": True} if kind == "WebP" else {}
    body = saved(smooth(), kind, icc_profile=profile, **options)
    np.testing.assert_array_equal(read(body), read(saved(smooth(), kind, **options)))


@pytest.mark.parametrize("content", [b"", b"name", b"name\0\0not deflated", b"name\0\x07" + zlib.compress(SRGB)])
def test_broken_iccp_chunk_is_ignored(content):
    assert np.abs(read(with_chunk(saved(smooth()), chunk(b"iCCP", content))).astype(int) - smooth()).max() <= 1


def test_deflated_profile_cannot_explode():
    bomb = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1 << 26), 9))
    np.testing.assert_array_equal(read(with_chunk(saved(noise()), bomb)), noise())


# ------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "AVIF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_truncated(kind, kept):
    body = saved(noise(64, 64), kind)
    with pytest.raises(MalformedBody, match="truncated or corrupt") as caught:
        read(body[: int(len(body) * kept)])
    assert len(str(caught.value)) < 150


def test_every_flipped_bit_in_the_pixels_of_a_png_is_noticed():
    body = write_png(noise(4, 4))
    start = body.index(b"IDAT")
    for at in range(start + 4, len(body) - 12):
        corrupt = bytearray(body)
        corrupt[at] ^= 1
        with pytest.raises(MalformedBody):
            read(bytes(corrupt))


def test_bomb_is_refused_before_it_is_decoded():
    rows = zlib.compress(bytes(1 << 20))
    body = b"\x89PNG\r\n\x1a\n" + ihdr(60000, 60000) + chunk(b"IDAT", rows) + chunk(b"IEND")
    assert image_size(body) == (60000, 60000)
    with pytest.raises(TooLarge, match="60000x60000"):
        read(body, max_pixels=1 << 26)


def test_limit_is_inclusive():
    assert read(saved(noise(8, 8)), max_pixels=64).shape == (8, 8, 3)
    with pytest.raises(TooLarge, match="limit of 63"):
        read(saved(noise(8, 8)), max_pixels=63)


def test_second_header_cannot_smuggle_another_size():
    with pytest.raises(MalformedBody, match="two different sizes"):
        read(with_chunk(saved(noise(8, 8)), ihdr(60000, 60000)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pillows_own_limit_is_not_asked(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    assert read(saved(noise(), kind)).shape == (9, 14, 3)


def test_pillows_own_limit_on_webp_is_too_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(TooLarge):
        read(saved(noise(), "WebP"))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"acTL", bytes(8)),  # an animation of no frames
        chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(1 << 24), 9)),
        chunk(b"tEXt", b"name\0" + bytes(100)),
        chunk(b"gAMA", b""),
    ],
)
def test_parts_that_make_no_pixels_are_not_read(extra):
    np.testing.assert_array_equal(read(with_chunk(saved(noise()), extra)), noise())


def test_broken_exif_is_not_read():
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x010F, 2, 1 << 20, 1 << 20)
    body = saved(smooth(), "JPEG", exif=exif)
    np.testing.assert_array_equal(read(body), read(saved(smooth(), "JPEG")))


def test_threads_do_not_meet():
    bodies = [saved(noise(64, 64, 4), kind) for kind in ("PNG", "WebP")] * 8
    bodies += [saved(smooth(), icc_profile=display_p3())] * 8
    with ThreadPoolExecutor(8) as pool:
        for together, body in zip(pool.map(read, bodies), bodies, strict=True):
            np.testing.assert_array_equal(together, read(body))


@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_alpha_is_kept_where_nothing_is_behind(kind):
    pixels = noise(channels=4)
    body = saved(pixels, kind, lossless=True, exact=True)
    found = read_image(body, read_header(body), background=None, max_pixels=1 << 20)
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    ("image", "alpha"),
    [
        (Image.fromarray(noise()), 255),
        (Image.fromarray(noise(channels=1)), 255),
        (Image.fromarray(noise()).convert("P"), 255),
        (Image.fromarray(noise(channels=4)).convert("LA"), noise(channels=4)[..., 3]),
    ],
)
def test_all_pictures_come_with_alpha_where_it_is_kept(image, alpha):
    body = saved(image)
    found = read_image(body, read_header(body), background=None, max_pixels=1 << 20)
    np.testing.assert_array_equal(found[..., :3], np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(found[..., 3], np.broadcast_to(alpha, found.shape[:2]))


def test_alpha_is_turned_upright_too():
    pixels = noise(channels=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = saved(pixels, exif=exif)
    found = read_image(body, read_header(body), background=None, max_pixels=1 << 20)
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(("media_type", "error"), [("image/png", 0), ("image/jpeg", 8), ("image/webp", 12)])
def test_write_and_read(media_type, error):
    body = write_image(smooth(), media_type)
    assert np.abs(read(body).astype(int) - smooth()).max() <= error


@pytest.mark.parametrize("media_type", ["image/jpeg", "image/webp"])
def test_quality(media_type):
    sizes = [len(write_image(noise(64, 64), media_type, quality=quality)) for quality in (1, 50, 90, 100)]
    assert sizes == sorted(set(sizes))
    assert len(write_image(noise(64, 64), media_type)) == sizes[2]


def test_avif_is_what_pillow_reads():
    file = write_image(smooth(64, 48), "image/avif")
    image = Image.open(io.BytesIO(file))
    assert (image.format, image.mode, image.size) == ("AVIF", "RGB", (48, 64))
    assert np.abs(np.asarray(image).astype(int) - smooth(64, 48)).mean() < 3
    assert file == write_image(smooth(64, 48), "image/avif")
    sizes = [len(write_image(smooth(64, 64), "image/avif", quality=quality)) for quality in (5, 50, 90, 100)]
    assert sizes == sorted(set(sizes))
    assert len(write_image(smooth(64, 64), "image/avif")) == sizes[2]


def test_non_contiguous_pixels():
    np.testing.assert_array_equal(
        read(write_image(smooth()[::2, ::-1], "image/jpeg")),
        read(write_image(smooth()[::2, ::-1].copy(), "image/jpeg")),
    )


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_quality_out_of_range(quality):
    with pytest.raises(InvalidParameter, match="1 to 100"):
        write_image(smooth(), "image/jpeg", quality=quality)


def test_quality_of_png():
    with pytest.raises(InvalidParameter, match="lossless"):
        write_image(smooth(), "image/png", quality=90)


def test_16_bits_are_for_png():
    for media_type in ("image/jpeg", "image/webp", "image/avif"):
        with pytest.raises(InvalidParameter, match="16"):
            write_image(noise(dtype=np.uint16), media_type)


@pytest.mark.parametrize(("media_type", "longest"), [("image/jpeg", 65500), ("image/webp", 16383)])
def test_longest_side(media_type, longest):
    assert image_size(write_image(np.zeros((1, longest, 3), np.uint8), media_type)) == (longest, 1)
    with pytest.raises(NotAcceptable, match=str(longest)):
        write_image(np.zeros((1, longest + 1, 3), np.uint8), media_type)


def test_longest_side_of_avif():
    assert Image.open(io.BytesIO(write_image(np.zeros((1, 16384, 3), np.uint8), "image/avif"))).size == (16384, 1)
    with pytest.raises(NotAcceptable, match="16384"):
        write_image(np.zeros((16385, 1, 3), np.uint8), "image/avif")


def test_other_media_types():
    with pytest.raises(NotAcceptable, match="image/gif"):
        write_image(smooth(), "image/gif")


def faded():
    return np.dstack([smooth(), smooth()[..., 0]])


@pytest.mark.parametrize(("media_type", "error"), [("image/png", 0), ("image/webp", 12), ("image/avif", 12)])
def test_alpha_is_written(media_type, error):
    image = Image.open(io.BytesIO(write_image(faded(), media_type)))
    assert image.mode == "RGBA"
    visible = faded()[..., 3] > 64
    assert np.abs(np.asarray(image).astype(int) - faded())[visible].max() <= error
    assert np.abs(np.asarray(image)[..., 3].astype(int) - faded()[..., 3]).max() <= 4


def test_a_jpeg_has_no_alpha_and_shows_white():
    image = Image.open(io.BytesIO(write_image(faded(), "image/jpeg")))
    assert image.mode == "RGB"
    colours, alpha = faded()[..., :3].astype(float), faded()[..., 3:] / 255
    assert np.abs(np.asarray(image) - (colours * alpha + 255 * (1 - alpha))).max() < 10


def test_alpha_made_and_laid_over():
    np.testing.assert_array_equal(opaque(smooth(), 3), smooth())
    four = opaque(smooth(), 4)
    np.testing.assert_array_equal(four, np.dstack([smooth(), np.full(smooth().shape[:2], 255, np.uint8)]))
    np.testing.assert_array_equal(flattened(four, PURPLE), smooth())
    np.testing.assert_array_equal(flattened(smooth(), PURPLE), smooth())
    four[..., 3] = 0
    assert (flattened(four, PURPLE) == PURPLE).all()
