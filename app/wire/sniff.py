"""Knows file formats by their first bytes, whatever a Content-Type says."""

import re

from app.errors import UnsupportedMedia
from app.wire.scan import Body

PICTURES = ("PNG", "JPEG", "WebP", "AVIF")
ARRAYS = ("npy", "npz", "safetensors", "pt")

# The formats that are not read are here so that an error can name what came.
_FIRST_BYTES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WebP": rb"RIFF.{4}WEBP",
    "npy": rb"\x93NUMPY",
    # torch.save: a zip file that begins with its pickle, or the pickle of a magic number
    "pt": rb"PK\x03\x04.{26}[^/\0]{1,255}/data\.pkl|\x80[\x02-\x05]\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.",
    "npz": rb"PK(\x03\x04|\x05\x06)",
    "safetensors": rb".{4}\0{4}\{",  # the header's length, below 4 GiB, and its JSON object
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*",
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC or HEIF": rb".{4}ftyp(he[iv][cmsx]|mif[12]|msf1)",
    "a file of MP4's kind": rb".{4}ftyp",
    "Matroska or WebM": rb"\x1a\x45\xdf\xa3",
    "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL ",
    "BMP": rb"BM.{4}\0{4}",
    "JPEG 2000": rb"\0{3}\x0cjP  |\xff\x4f\xff\x51",
    "ICO": rb"\0\0\x01\0",
    "a Photoshop file": rb"8BPS",
    "PDF": rb"%PDF-",
    "SVG or XML": rb"\s{0,64}<(\?xml|svg)",
    "PPM or one of its kind": rb"P[1-7]\s",
}
_FORMATS = {name: re.compile(first_bytes, re.DOTALL) for name, first_bytes in _FIRST_BYTES.items()}


def sniffed(body: Body) -> str | None:
    """The format's name, where it is known."""
    return next((name for name, first_bytes in _FORMATS.items() if first_bytes.match(body)), None)


def sniff(body: Body, expected: tuple[str, ...]) -> str:
    """The format's name, one of `expected`; UnsupportedMedia names the expected ones and what came."""
    found = sniffed(body)
    if found in expected:
        return found
    got = found or (f"bytes that begin with {bytes(body[:12])!r}" if len(body) else "an empty body")
    raise UnsupportedMedia(f"expected {', '.join(expected[:-1])} or {expected[-1]}, got {got}")
