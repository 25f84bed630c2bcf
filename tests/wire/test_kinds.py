"""The table in docs/requests.md, row by row: files as Pillow writes them, and what comes of each."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from app.errors import InvalidImage, UnsupportedMedia
from app.wire.headers import read_header
from app.wire.images import read_image
from app.wire.png import write_png

GUIDE = Path(__file__).parents[2] / "docs" / "requests.md"
BACKGROUND = (200, 30, 60)
SIDE = 32


def colours() -> np.ndarray:
    """A smooth picture, which survives lossy formats."""
    x, y = np.meshgrid(np.linspace(0, 255, SIDE), np.linspace(0, 255, SIDE))
    return np.stack([x, y, 255 - (x + y) / 2], axis=-1).astype(np.uint8)


RGB = Image.fromarray(colours())
GREY = RGB.convert("L")
ALPHA = Image.linear_gradient("L").resize((SIDE, SIDE))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunked(name: bytes, data: bytes) -> Callable[[], bytes]:
    """A PNG with a chunk more behind its header."""
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    body = file(RGB)
    return lambda: body[:33] + chunk + body[33:]


def deep() -> np.ndarray:
    return np.asarray(GREY).astype(np.uint16) * 257


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def over(image: Image.Image, alpha: Image.Image = ALPHA) -> np.ndarray:
    return np.asarray(Image.composite(image.convert("RGB"), Image.new("RGB", image.size, BACKGROUND), alpha))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def keyed(image: np.ndarray, key: Any) -> np.ndarray:
    """Where the key is, the background shows."""
    grey = np.asarray(GREY)
    there = np.all(image == key, axis=-1) if image.ndim == 3 else grey == key // 257
    rgb = image if image.ndim == 3 else np.stack([grey] * 3, axis=-1)
    return np.where(there[..., None], np.array(BACKGROUND, np.uint8), rgb)


GREYS = np.stack([np.asarray(GREY)] * 3, axis=-1)
BITS = np.asarray(RGB.convert("1").convert("RGB"))
PALETTE = RGB.quantize(64)
KEY = tuple(int(value) for value in colours()[3, 5])
SECOND = Image.new("RGB", (SIDE, SIDE), (1, 2, 3))
UPRIGHT = np.asarray(RGB.transpose(Image.Transpose.ROTATE_270))

# (what it is made by, what is read of it, by how many levels it may be off)
READ: dict[str, tuple[Callable[[], bytes], np.ndarray, int]] = {
    "PNG, 8 bits RGB": (lambda: file(RGB), colours(), 0),
    "PNG, black and white": (lambda: file(RGB.convert("1")), BITS, 0),
    "PNG, grey of 8 bits": (lambda: file(GREY), GREYS, 0),
    "PNG, grey of 16 bits": (lambda: file(Image.fromarray(deep())), GREYS, 0),
    "PNG, colour of 16 bits": (lambda: write_png(colours().astype(np.uint16) * 257), colours(), 0),
    "PNG, palette": (lambda: file(PALETTE), np.asarray(PALETTE.convert("RGB")), 0),
    "PNG, palette with tRNS": (
        lambda: file(PALETTE, transparency=bytes([0] * 64)),
        np.full_like(colours(), BACKGROUND),
        0,
    ),
    "PNG, grey with alpha": (lambda: file(with_alpha(GREY)), over(GREY), 0),
    "PNG, RGBA": (lambda: file(with_alpha(RGB)), over(RGB), 0),
    "PNG, a colour in tRNS": (lambda: file(RGB, transparency=KEY), keyed(colours(), KEY), 0),
    "PNG, grey of 16 bits with tRNS": (
        lambda: file(Image.fromarray(deep()), transparency=int(deep()[3, 5])),
        keyed(deep(), int(deep()[3, 5])),
        0,
    ),
    "PNG, gAMA": (
        chunked(b"gAMA", struct.pack(">I", 100_000)),
        np.clip(
            np.where(
                colours() / 255 <= 0.0031308,
                colours() / 255 * 12.92,
                1.055 * (colours() / 255) ** (1 / 2.4) - 0.055,
            )
            * 255,
            0,
            255,
        )
        .round()
        .astype(np.uint8),
        1,
    ),
    "PNG, cICP of sRGB": (chunked(b"cICP", bytes([1, 13, 0, 1])), colours(), 0),
    "PNG, ICC profile": (lambda: file(RGB, icc_profile=SRGB), colours(), 1),
    "PNG, animated": (lambda: file(RGB, save_all=True, append_images=[SECOND]), colours(), 0),
    "PNG, EXIF orientation": (lambda: file(RGB, exif=turned()), UPRIGHT, 0),
    "JPEG": (lambda: file(RGB, "JPEG", quality=95), colours(), 8),
    "JPEG, grey": (lambda: file(GREY, "JPEG", quality=95), GREYS, 4),
    "JPEG, progressive": (lambda: file(RGB, "JPEG", quality=95, progressive=True), colours(), 8),
    "JPEG, CMYK": (lambda: file(RGB.convert("CMYK"), "JPEG", quality=95, subsampling=0), colours(), 8),
    "JPEG, EXIF orientation": (lambda: file(RGB, "JPEG", quality=95, exif=turned()), UPRIGHT, 8),
    "JPEG, with a second picture (MPO)": (
        lambda: file(RGB, "MPO", save_all=True, append_images=[SECOND], quality=95),
        colours(),
        8,
    ),
    "WebP, lossy": (lambda: file(RGB, "WEBP", quality=95), colours(), 12),
    "WebP, lossless": (lambda: file(RGB, "WEBP", lossless=True), colours(), 0),
    "WebP, alpha": (lambda: file(with_alpha(RGB), "WEBP", lossless=True, exact=True), over(RGB), 0),
    "WebP, animated": (
        lambda: file(RGB, "WEBP", save_all=True, append_images=[SECOND], lossless=True),
        colours(),
        0,
    ),
    "AVIF": (lambda: file(RGB, "AVIF", quality=95), colours(), 12),
    "AVIF, grey": (lambda: file(GREY, "AVIF", quality=95), GREYS, 8),
    "AVIF, alpha": (lambda: file(with_alpha(RGB), "AVIF", quality=95), over(RGB), 12),
    "AVIF, alpha multiplied in": (
        lambda: file(with_alpha(RGB), "AVIF", quality=100, alpha_premultiplied=True),
        over(RGB),
        24,
    ),
    "AVIF, ICC profile": (lambda: file(RGB, "AVIF", quality=95, icc_profile=SRGB), colours(), 12),
    "AVIF, turned (irot, imir)": (lambda: file(RGB, "AVIF", quality=95, exif=turned()), UPRIGHT, 12),
    "AVIF, a sequence": (
        lambda: file(RGB, "AVIF", quality=95, save_all=True, append_images=[SECOND]),
        colours(),
        12,
    ),
}


def relabelled(before: bytes, after: bytes) -> bytes:
    """An AVIF that says something else."""
    body = file(RGB, "AVIF")
    assert body.count(before)
    return body.replace(before, after)


REFUSED: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "PNG, cICP of PQ": (chunked(b"cICP", bytes([9, 16, 0, 1])), InvalidImage, "HDR"),
    "AVIF, a grid of pictures": (lambda: relabelled(b"av01", b"grid"), InvalidImage, "got a grid of pictures$"),
    "AVIF, layers of one picture": (lambda: relabelled(b"pixi", b"lsel"), InvalidImage, "several layers"),
    "AVIF, PQ or HLG": (lambda: relabelled(b"nclx\0\1\0\x0d", b"nclx\0\x09\0\x10"), InvalidImage, "AVIF is HDR"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", UnsupportedMedia, "got HEIC or HEIF$"),
    "JPEG XL": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n", UnsupportedMedia, "got JPEG XL$"),
    "JPEG 2000": (lambda: file(RGB, "JPEG2000"), UnsupportedMedia, "got JPEG 2000$"),
    "GIF": (lambda: file(RGB, "GIF"), UnsupportedMedia, "got GIF$"),
    "GIF, animated": (lambda: file(RGB, "GIF", save_all=True, append_images=[SECOND]), UnsupportedMedia, "got GIF$"),
    "TIFF": (lambda: file(RGB, "TIFF"), UnsupportedMedia, "got TIFF$"),
    "BMP": (lambda: file(RGB, "BMP"), UnsupportedMedia, "got BMP$"),
    "ICO": (lambda: file(RGB, "ICO"), UnsupportedMedia, "got ICO$"),
    "PPM": (lambda: file(RGB, "PPM"), UnsupportedMedia, "got PPM or one of its kind$"),
    "TGA": (lambda: file(RGB, "TGA"), UnsupportedMedia, "got bytes that begin with"),
}

ELSEWHERE = {"PNG, cICP of Display P3", "AVIF, CICP of Display P3"}
"""tests/wire/test_colour.py."""


def rows() -> dict[str, str]:
    """The table: kind -> what happens."""
    text = GUIDE.read_text().partition("| kind | what happens |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)[1:])


def test_every_row_is_tried_and_there_is_a_row_for_each():
    assert set(rows()) == set(READ) | set(REFUSED) | ELSEWHERE


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind):
    build, expected, levels = READ[kind]
    body = build()
    header = read_header(body)
    pixels = read_image(body, header, background=BACKGROUND, max_pixels=SIDE * SIDE)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= levels
    assert ("X-Warning" in rows()[kind]) == (header.frames > 1)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_named(kind):
    build, error, match = REFUSED[kind]
    with pytest.raises(error, match=match):
        read_header(build())
    assert rows()[kind].startswith("415" if error is UnsupportedMedia else "422")


def test_files_that_are_no_pictures_are_named_too():
    for body, name in (
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a file of MP4's kind"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"<?xml version='1.0'?><svg/>", "SVG or XML"),
        (b" " * 65 + b"<svg/>", "bytes that begin"),
    ):
        with pytest.raises(UnsupportedMedia, match=f"expected PNG, JPEG, WebP or AVIF, got {name}"):
            read_header(body)
