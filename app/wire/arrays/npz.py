"""Zip archives: several arrays as .npz, several pictures as .zip. Trusts no size that an archive states."""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

from app.errors import InvalidImage, InvalidInput, InvalidLatent, MalformedBody, TooLarge
from app.wire.arrays.npy import MAX_HEADER, npy_header, write_npy
from app.wire.arrays.spec import ArraySpec, Values, check_size, values
from app.wire.scan import Body, count

MAX_MEMBERS = 1024

_CACHED = re.compile(r"latents((?:_[0-9]+x[0-9]+)?)\.npy")
"""What sd-scripts calls cached latents: one array, or one for each resolution, (h)x(w). Beside each it writes
`original_size` and `crop_ltrb` of the same ending, which tell its files, and maybe `latents_flipped` and `alpha_mask`.
Facts: github.com/kohya-ss/sd-scripts, library/strategy_base.py."""

_ENTRY = b"PK\x01\x02"  # begins each entry of the directory
_ENCRYPTED = 0x1
_READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others cannot be inflated within a bound
_DECODE_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, OverflowError, NotImplementedError)


def npz_headers(body: Body) -> tuple[list[ArraySpec], bool]:
    """What the arrays of a .npz file declare, in name order; whether they are what sd-scripts caches of a picture.

    Their data stays compressed. Of such a cache the latents count, mirrored ones, masks and sizes do not.

    Raises MalformedBody, TooLarge above `MAX_MEMBERS` arrays, and InvalidLatent as `npy_header` does.
    """
    with _archive(body) as archive:
        members, cached = _latents(_members(archive))
        return [_header(archive, member) for member in members], cached


def read_npz(body: Body, max_bytes: int) -> list[Values]:
    """The arrays (N, C, h, w) of a .npz file in name order, numbers by value: `arr_2` before `arr_10`.

    Raises TooLarge where they are more than `max_bytes` uncompressed, before any is inflated; else as `npz_headers`.
    """
    with _archive(body) as archive:
        members, _ = _latents(_members(archive))
        _check_total(members, max_bytes)
        return [values(_header(archive, member), _inflate(archive, member)) for member in members]


def read_zip(body: Body, max_bytes: int) -> dict[str, bytes]:
    """The files of a zip archive by their names, in their order.

    Raises MalformedBody, and TooLarge where they are more than `max_bytes` uncompressed, before any is inflated.
    """
    with _archive(body) as archive:
        members = _readable(archive)
        _check_total(members, max_bytes)
        return {member.filename: _inflate(archive, member) for member in members}


def write_npz(arrays: list[npt.NDArray[Any]]) -> bytes:
    """A .npz file of arrays of any shapes, stored; named 0, 1, .., zero-padded so that sorting keeps their order."""
    digits = len(str(len(arrays) - 1))
    return write_zip([(f"{index:0{digits}}.npy", write_npy(array)) for index, array in enumerate(arrays)])


def write_zip(files: list[tuple[str, bytes]]) -> bytes:
    """A zip archive of (name, content), stored: pictures don't shrink, and the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.external_attr = 0o644 << 16  # without it, unzip makes files that nobody may read
            archive.writestr(entry, content)
    return buffer.getvalue()


def pictures_of(body: Body) -> list[zipfile.ZipInfo]:
    """The PNG files of a zip archive in name order, numbers by value; `file_of` reads one.

    Raises InvalidImage where it holds others or none, else as `npz_headers`.
    """
    with _archive(body) as archive:
        return _members(archive, ".png", InvalidImage)


def file_of(body: Body, member: zipfile.ZipInfo, max_bytes: int, first: int | None = None) -> bytes:
    """The content of one, or its `first` bytes. Raises TooLarge where it takes more than `max_bytes`."""
    if member.file_size > max_bytes:
        raise TooLarge(f"{member.filename[:40]!r} has {member.file_size} bytes, more than the limit of {max_bytes}")
    with _archive(body) as archive:
        return _inflate(archive, member, first)


@contextmanager
def _archive(body: Body) -> Iterator[zipfile.ZipFile]:
    # ZipFile parses the whole directory at once, so its length is bounded first.
    if count(_ENTRY, body) > MAX_MEMBERS:
        raise TooLarge(f"the archive holds more than {MAX_MEMBERS} files")
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            yield archive
    except _DECODE_ERRORS as error:
        raise MalformedBody(f"the archive is truncated or corrupt: {str(error)[:80]}") from error


def _members(
    archive: zipfile.ZipFile, ending: str = ".npy", wrong: type[InvalidInput] = InvalidLatent
) -> list[zipfile.ZipInfo]:
    members = _readable(archive)
    if not members:
        raise wrong("the archive is empty")
    for member in members:
        if not member.filename.endswith(ending):
            raise wrong(f"expected only {ending} files in the archive, got {member.filename[:40]!r}")
    return members


def _readable(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """All, by name."""
    members = sorted(archive.infolist(), key=lambda member: _natural(member.filename))
    for member in members:
        if member.compress_type not in _READABLE or member.flag_bits & _ENCRYPTED:
            raise MalformedBody(f"{member.filename[:40]!r} is neither stored nor deflated, or encrypted")
    return members


def _check_total(members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise TooLarge(f"the archive holds {total} bytes uncompressed, more than the limit of {max_bytes}")


def _latents(members: list[zipfile.ZipInfo]) -> tuple[list[zipfile.ZipInfo], bool]:
    """Those that are latents; whether sd-scripts made them."""
    names = {member.filename for member in members}
    found = [(member, _CACHED.fullmatch(member.filename)) for member in members]
    cached = [member for member, match in found if match and f"original_size{match[1]}.npy" in names]
    return cached or members, bool(cached)


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ArraySpec:
    with archive.open(member) as file:
        spec = npy_header(file.read(MAX_HEADER))
    check_size(spec, member.file_size)
    return spec


def _inflate(archive: zipfile.ZipFile, member: zipfile.ZipInfo, first: int | None = None) -> bytes:
    with archive.open(member) as file:
        # archive.read() would inflate up to 2 GiB whatever the size says.
        return file.read(min(first or member.file_size, member.file_size))


def _natural(name: str) -> list[tuple[int, str]]:
    text_and_digits = enumerate(re.split("([0-9]+)", name))
    return [(int(part), "") if index % 2 else (0, part) for index, part in text_and_digits]
