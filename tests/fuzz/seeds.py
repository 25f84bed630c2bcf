"""Small sound files of every kind that is read, from which wrong ones are made. Without torch."""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from app.weights.header import Entry, Header, format_header
from app.wire.arrays.npz import write_npz, write_zip
from app.wire.arrays.tensors import write_safetensors
from tests.fuzz.mutation import BROKEN
from tests.store.hostile import CORPUS, alone, legacy, state, tensor, zipped

KEPT = Path(__file__).parent / "corpus"
"""What guided runs found to reach more of the code than these, a folder each."""


def numbers(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    """Of a normal distribution; bytes are bytes."""
    random = np.random.default_rng(0)
    if dtype == np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape).astype(dtype)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy() -> Iterator[bytes]:
    """Latents and pictures."""
    yield _npy(numbers(1, 4, 4, 4))
    yield _npy(numbers(4, 4, 4, dtype=">f4"))
    yield _npy(np.asfortranarray(numbers(2, 4, 3, 5, dtype=np.float32)))
    yield _npy(numbers(2, 6, 5, 3, dtype=np.uint8))
    yield _npy(numbers(1, 4, 1, 4, 4))
    yield b"\x93NUMPY\x02\0" + struct.pack("<I", 60) + _npy(numbers(1, 4, 2, 2))[10:70].ljust(60) + bytes(32)


def npz() -> Iterator[bytes]:
    """Of one array and of several, stored, deflated, and as sd-scripts caches them."""
    arrays = [numbers(4, 4, 4), numbers(2, 4, 2, 6)]
    yield write_npz([*arrays])
    file = io.BytesIO()
    np.savez_compressed(file, *arrays)
    yield file.getvalue()
    names = ("latents_4x4.npy", "original_size_4x4.npy", "crop_ltrb_4x4.npy")
    cached = (arrays[0], np.array([32, 32]), np.array([0, 0, 32, 32]))
    yield write_zip([(name, _npy(array)) for name, array in zip(names, cached, strict=True)])


def _tensors(metadata: dict[str, str], **arrays: np.ndarray) -> bytes:
    entries, at = {}, 0
    codes = {"float16": "F16", "float32": "F32", "uint8": "U8", "uint16": "BF16"}
    for name, array in arrays.items():
        entries[name] = Entry(codes[array.dtype.name], array.shape, at, at + array.nbytes)
        at += array.nbytes
    return format_header(Header(entries, metadata)) + b"".join(array.tobytes() for array in arrays.values())


def safetensors() -> Iterator[bytes]:
    """Ours with all that it says, ComfyUI's, bfloat16, and pictures."""
    said = {"family": "sd1", "convention": "scaled", "image_size": "30x31", "image_fit": "pad", "sha256": "0" * 64}
    yield write_safetensors(numbers(1, 4, 4, 4), said)
    yield _tensors(
        {}, latent_tensor=numbers(1, 4, 4, 4, dtype=np.float32), latent_format_version_0=np.zeros(0, np.uint8)
    )
    yield _tensors({"prompt": "{}"}, latent_tensor=numbers(1, 4, 4, 4, dtype=np.float32))
    yield _tensors({}, samples=numbers(1, 4, 4, 4).view(np.uint16))
    yield _tensors({}, pixels=numbers(1, 6, 6, 3, dtype=np.uint8))


def weights() -> Iterator[bytes]:
    """Of a few tensors."""
    yield _tensors({"format": "pt"}, a=numbers(3, 2), b=numbers(4, dtype=np.float32), c=np.zeros(0, np.uint8))
    yield _tensors({})


def pickled() -> Iterator[bytes]:
    """The pickles of archives, sound and hostile, by themselves."""
    yield state(x=tensor(), y=tensor("0", 4, (2, 2), (2, 1)))
    yield alone(tensor(shape=(1, 4, 1, 1), stride=(4, 1, 1, 1)))
    yield state(latents=tensor(shape=(1, 4, 1, 1), stride=(4, 1, 1, 1)))
    yield pickle.dumps({"state_dict": {"a": [1, 2.5, "x", None, True, (1, 2), {3: 4}]}, "epoch": 7}, 2)
    yield pickle.dumps([{"a": b"bytes"}, {1, 2}, 1 << 70, "ä"], 4)
    for body in hostile():
        yield from _members(body)


@cache
def hostile() -> tuple[bytes, ...]:
    """The small ones of the hostile files: some take a second to make."""
    return tuple(body for each in CORPUS if len(body := each.build()) < 1 << 12)


def _members(body: bytes) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    except BROKEN:
        return


def archives() -> Iterator[bytes]:
    """Of torch.save, of both kinds, sound and hostile."""
    yield zipped(state(x=tensor()))
    yield zipped(alone(tensor(shape=(1, 4, 1, 1), stride=(4, 1, 1, 1))))
    yield zipped(alone(tensor(shape=(4, 2, 2), stride=(0, 2, 1))))
    yield legacy(state(latents=tensor(shape=(1, 4, 1, 1), stride=(4, 1, 1, 1))))
    yield from hostile()


def _saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def _image(mode: str = "RGB", side: int = 16) -> Image.Image:
    return Image.fromarray(numbers(side, side + 3, 3, dtype=np.uint8)).convert(mode)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png() -> Iterator[bytes]:
    """Of every colour type, with what says how to show them, and one that moves."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield _saved(_image(mode), "PNG")
    yield _saved(Image.fromarray(numbers(5, 5, dtype=np.float32).view(np.uint16)[:, :5].copy()), "PNG")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield _saved(_image(), "PNG", icc_profile=profile, exif=_exif(6), dpi=(72, 72))
    yield _saved(_image("P"), "PNG", transparency=3)
    yield _saved(_image("L"), "PNG", transparency=7)
    yield _saved(_image(), "PNG", save_all=True, append_images=[_image("L").convert("RGB")])


def jpeg() -> Iterator[bytes]:
    """Grey, colour, CMYK, progressive, with EXIF and a profile."""
    for mode in ("L", "RGB", "CMYK"):
        yield _saved(_image(mode), "JPEG")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield _saved(_image(), "JPEG", progressive=True, exif=_exif(3), icc_profile=profile)
    yield _saved(_image(), "JPEG", subsampling="4:2:0", restart_marker_blocks=1)


def webp() -> Iterator[bytes]:
    """Lossy, lossless, with alpha, with EXIF, and one that moves."""
    yield _saved(_image(), "WEBP")
    yield _saved(_image("RGBA"), "WEBP", lossless=True, exif=_exif(5))
    yield _saved(_image("RGBA"), "WEBP", quality=30)
    yield _saved(_image(), "WEBP", save_all=True, append_images=[_image("L").convert("RGB")])


def avif() -> Iterator[bytes]:
    """With and without alpha, turned, and one that moves."""
    yield _saved(_image(), "AVIF", speed=10)
    yield _saved(_image("RGBA"), "AVIF", speed=10, exif=_exif(8))
    yield _saved(_image(), "AVIF", speed=10, save_all=True, append_images=[_image("L").convert("RGB")])


BOUNDARY = "b0undary"


def form() -> Iterator[bytes]:
    """Multipart forms with this boundary."""
    head = b'--b0undary\r\nContent-Disposition: form-data; name="image"; filename="a b.png"\r\n\r\n'
    yield head + b"one\r\n" + head + b"\r\n--b0undary--\r\n"
    yield b"preamble\r\n" + head + b"two" + b"\r\n--b0undary--"


def kept(target: str) -> Iterator[bytes]:
    """What guided runs found."""
    if (folder := KEPT / target).is_dir():
        yield from (path.read_bytes() for path in sorted(folder.iterdir()))
