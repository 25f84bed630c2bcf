"""Pictures and latents as bytes, and bytes as arrays."""

import io
import os
import re
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from latentd_client.errors import UnexpectedAnswer

if TYPE_CHECKING:
    from PIL.Image import Image

Array: TypeAlias = npt.NDArray[Any]
Pathname: TypeAlias = str | os.PathLike[str]
Picture: TypeAlias = "Pathname | bytes | Array | Image"
"""A file, its bytes, a PIL picture, or an array: uint8 (H, W, 3) or (N, H, W, 3), float16 or float32 (3, H, W) or
(N, 3, H, W) in [-1, 1]; for a model that takes alpha also with a fourth channel."""

NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/x-safetensors"
PNG, JPEG, WEBP, AVIF = "image/png", "image/jpeg", "image/webp", "image/avif"
ZIP = "application/zip"

LATENTS = {".npy": NPY, ".npz": NPZ, ".safetensors": SAFETENSORS}
PICTURES = {".npy": NPY, ".png": PNG, ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP, ".avif": AVIF, ".zip": ZIP}


def picture_body(picture: Picture) -> bytes:
    """What is sent for a picture. Raises OSError, TypeError and ValueError."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, np.ndarray):
        return npy(_batch(picture))
    if getattr(picture, "mode", None) == "RGB":
        return npy(np.asarray(picture)[None])
    if hasattr(picture, "mode"):  # alpha, palettes, grey: the service knows what to make of them
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        return file.getvalue()
    raise TypeError(f"a picture is a path, bytes, an array or a PIL picture; got {type(picture).__name__}")


def picture_file(picture: Picture) -> bytes:
    """The same as a file, for what takes no arrays. Raises as `picture_body`, and ValueError for other than uint8."""
    if getattr(picture, "mode", None) == "RGB":
        picture = np.asarray(picture)
    if not isinstance(picture, np.ndarray):
        return picture_body(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"here a picture is uint8 (H, W, 3); got {picture.dtype} {picture.shape}")
    return _png(picture)


def _png(array: Array) -> bytes:
    """Without Pillow: no filter, little compression."""
    height, width, _ = array.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter's number: none
    lines[:, 1:] = array.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def latents_body(latents: Pathname | bytes | Array) -> bytes:
    """What is sent for latents. Raises OSError and TypeError."""
    if isinstance(latents, bytes):
        return latents
    if isinstance(latents, str | os.PathLike):
        return Path(latents).read_bytes()
    if isinstance(latents, np.ndarray):
        return npy(latents)
    raise TypeError(f"latents are a path, bytes, an array or what encode gave; got {type(latents).__name__}")


def _batch(array: Array) -> Array:
    if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-1] in (3, 4):
        return array if array.ndim == 4 else array[None]
    if array.dtype in (np.float16, np.float32) and array.ndim in (3, 4) and array.shape[-3] in (3, 4):
        return array if array.ndim == 4 else array[None]
    raise ValueError(
        "pictures are uint8 (H, W, 3) or (N, H, W, 3), or float16 or float32 (3, H, W) or (N, 3, H, W), or with alpha "
        f"4 for 3; got {array.dtype} {array.shape}"
    )


def npy(array: Array) -> bytes:
    """The file that numpy.save writes."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def array_of(content: bytes, media: str) -> Array:
    """An .npy as an array, a PNG, JPEG, WebP or AVIF as uint8 (1, H, W, 3), with alpha (1, H, W, 4).

    Raises ValueError for other types, and UnexpectedAnswer for content that is not of its type.
    """
    if media == NPY:
        return _npy_array(content)
    if media in (PNG, JPEG, WEBP, AVIF):
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content)) as picture:
                return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))[None]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnexpectedAnswer(f"not a picture of {media}: {error}") from error
    raise ValueError(f"{media} is no single array: its bytes are in `content`")


_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<][uf]\d)', 'fortran_order': False, 'shape': \(([\d, ]{1,80})\), \} *\n",
    re.DOTALL,
)
"""The beginning of an .npy as the service and numpy write it, of whole numbers without a sign and floats."""


def _npy_array(content: bytes) -> Array:
    """Its shape is believed where it has as many bytes. Raises UnexpectedAnswer."""
    found = _NPY.match(content)
    if found is None:
        raise UnexpectedAnswer(f"not the .npy of an array: {content[:80]!r}")
    shape = [int(side) for side in found[2].split(b",") if side.strip()]
    try:
        return np.frombuffer(bytearray(memoryview(content)[found.end() :]), np.dtype(found[1].decode())).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise UnexpectedAnswer(f"an .npy of {shape} with {len(content) - found.end()} bytes: {error}") from error


def media_of(path: Pathname, known: dict[str, str]) -> str:
    """The type that a file's name asks for. Raises ValueError."""
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise ValueError(f"{os.fspath(path)}: expected a name that ends in {', '.join(known)}")
    return known[suffix]


def write_file(path: Pathname, content: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        with suppress(OSError):  # moved, or never made
            partial.unlink()
