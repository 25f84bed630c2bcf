"""The two containers of torch.save: a zip file of records (since 1.6), and a run of pickles with the storages behind.

Reading one takes its pickle and the places of its storages, whose bytes are for those to read who want a tensor's
numbers. Without torch. Facts: torch/serialization.py (`_save`, `_legacy_save`).
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader

from app.errors import UnsupportedCheckpoint
from app.text import short
from app.weights.machine import MOST_STEPS
from app.weights.pickles import read_pickle
from app.weights.rebuilds import DTYPES, TensorRef, kind
from app.weights.zips import data_offset, read_records

ZIP_MAGIC = b"PK\x03\x04"
TAR_MAGIC = b"ustar"  # at byte 257: torch before 0.1.10
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

MOST_LEVELS = 16  # of dicts around a state dict; a pickle may hold itself
WIDEST = 16  # times its own size that a tensor may be spread over its storage


@dataclass(frozen=True)
class Archive:
    """A checkpoint of torch.save: its pickle's value, and its storages by key."""

    content: object
    sizes: Mapping[str, int]  # bytes of each storage that the file has
    place: Callable[[BufferedReader, str], int]
    """The byte of the file where a storage begins; raises UnsupportedCheckpoint where the file contradicts itself."""


def read_archive(file: BufferedReader, most_steps: int = MOST_STEPS) -> Archive:
    """What torch.save wrote to a file, storages unread, each of its pickles in at most so many steps.

    Raises UnsupportedCheckpoint with a one-line reason.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = file.read(4)
    if begin == ZIP_MAGIC:
        return _zipped(file, size, most_steps)
    file.seek(257)
    if file.read(len(TAR_MAGIC)) == TAR_MAGIC:
        raise UnsupportedCheckpoint("a tar file, as torch before 0.1.10 wrote; save it again with a later one")
    file.seek(0)
    return _legacy(file, size, most_steps)


def state_dict(archive: Archive) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors of a pickled dict, of its `state_dict`, or of the one dict that is all it holds; the other keys."""
    content = archive.content
    for _ in range(MOST_LEVELS):
        if not isinstance(content, dict):
            break
        inner = content.get("state_dict", next(iter(content.values())) if len(content) == 1 else None)
        if isinstance(inner, dict):
            content = inner
            continue
        tensors = {key: value for key, value in content.items() if isinstance(value, TensorRef)}
        others = {key: kind(value) for key, value in content.items() if key not in tensors}
        if not tensors:
            break
        for key, ref in tensors.items():
            check_there(archive, key, ref)
        return tensors, others
    held = kind(content)
    if isinstance(content, dict) and content:
        held += f" with {', '.join(f'{short(key)} ({kind(value)})' for key, value in [*content.items()][:3])}"
    raise UnsupportedCheckpoint(f"holds no tensors by name: {held} where a state dict was expected")


def check_there(archive: Archive, key: str, ref: TensorRef) -> None:
    """Raises UnsupportedCheckpoint unless the file has the storage of the tensor `key`, all of it."""
    wanted = ref.storage.nbytes
    there = archive.sizes.get(ref.storage.key)
    if there is None:
        raise UnsupportedCheckpoint(f"truncated or broken: the storage of {short(key)} is not in the file")
    if there < wanted:
        raise UnsupportedCheckpoint(f"truncated or broken: the storage of {short(key)} has {there} bytes of {wanted}")


def span_of(file: BufferedReader, archive: Archive, key: str, ref: TensorRef) -> tuple[int, int]:
    """(first, after the last) byte of the file that the tensor `key` touches; its storage's other bytes are nobody's.

    Raises UnsupportedCheckpoint where it is spread over far more than its size, or the file is truncated.
    """
    check_there(archive, key, ref)
    first, after = ref.span
    if after - first > WIDEST * max(ref.nbytes, 1 << 16):
        raise UnsupportedCheckpoint(f"{short(key)} has {ref.nbytes} bytes, spread over {after - first} of its storage")
    if first == after:
        return 0, 0
    begin = archive.place(file, ref.storage.key)
    return begin + first, begin + after


def _zipped(file: BufferedReader, size: int, most_steps: int) -> Archive:
    records = read_records(file, size)
    folders = [name.removesuffix("/data.pkl") for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise UnsupportedCheckpoint(f"a zip file, but not of torch.save: {len(folders)} data.pkl where 1 was expected")
    folder = folders[0]
    if f"{folder}/constants.pkl" in records or any(name.startswith(f"{folder}/code/") for name in records):
        raise UnsupportedCheckpoint("refused: a TorchScript archive, which is a program; a state dict was expected")
    if order := records.get(f"{folder}/byteorder"):
        file.seek(data_offset(file, order))
        if (text := file.read(min(order.size, 16))) != b"little":
            raise UnsupportedCheckpoint(f"its byte order is {short(text.decode('latin-1'))}; little was expected")
    pickled = records[f"{folder}/data.pkl"]
    file.seek(data_offset(file, pickled))
    content = read_pickle(file, pickled.size, most_steps).value
    under = f"{folder}/data/"
    storages = {name.removeprefix(under): record for name, record in records.items() if name.startswith(under)}
    sizes = {key: record.size for key, record in storages.items()}
    return Archive(content, sizes, lambda file, key: data_offset(file, storages[key]))


def _legacy(file: BufferedReader, size: int, most_steps: int) -> Archive:
    """Five pickles: magic number, protocol, system, the object, the keys of its storages; then those, in that order."""
    try:
        magic = read_pickle(file, size, most_steps).value
    except UnsupportedCheckpoint as error:
        if str(error).startswith("refused"):
            raise
        raise UnsupportedCheckpoint(f"not a checkpoint of torch.save, or truncated: {error}") from error
    if magic != MAGIC:
        raise UnsupportedCheckpoint(f"not a checkpoint of torch.save: a pickle that holds {kind(magic)}")
    protocol, system, content, keys = (read_pickle(file, size - file.tell(), most_steps) for _ in range(4))
    if protocol.value != PROTOCOL or not isinstance(system.value, dict):
        raise UnsupportedCheckpoint("not a checkpoint of torch.save: its protocol is not 1001")
    if system.value.get("little_endian") is not True:
        raise UnsupportedCheckpoint("its byte order is not little-endian, which was expected")
    if not isinstance(keys.value, list):
        raise UnsupportedCheckpoint("not a sound checkpoint of torch.save: no list of storages behind the pickle")
    places: dict[str, int] = {}
    sizes: dict[str, int] = {}
    at = file.tell()
    for key in keys.value:
        if type(key) is not str or key in places or key not in content.storages:
            raise UnsupportedCheckpoint("not a sound checkpoint of torch.save: its storages are not its pickle's")
        file.seek(at)
        count = file.read(8)  # of elements, before them
        nbytes = int.from_bytes(count, "little", signed=True) * DTYPES[content.storages[key].dtype]
        if len(count) < 8 or nbytes > size - at - 8:
            raise UnsupportedCheckpoint(f"truncated: a storage of {nbytes} bytes at byte {at}, the file has {size}")
        if nbytes < 0:
            raise UnsupportedCheckpoint(f"not a sound checkpoint of torch.save: a storage of {nbytes} bytes")
        places[key], sizes[key] = at + 8, nbytes
        at += 8 + nbytes
    return Archive(content.value, sizes, lambda _, key: places[key])
