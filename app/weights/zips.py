"""The records of a zip file that torch.save wrote: stored, not compressed, one after another; nothing is extracted.

Only the central directory is read, and the local header of each record that is asked for. What torch.save does not
write is refused rather than interpreted: readers of zip files differ in what they make of it. Format: PKWARE's
APPNOTE.TXT 6.3.10, sections 4.3 and 4.4.
"""

import struct
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise

from app.errors import UnsupportedCheckpoint
from app.text import short

MOST_RECORDS = 100_000  # a checkpoint has one for each storage
LARGEST_DIRECTORY = 64 << 20  # bytes

LOCAL = struct.Struct("<4s5H3I2H")  # 4.3.7
CENTRAL = struct.Struct("<4s6H3I5H2I")  # 4.3.12
END64 = struct.Struct("<4sQ2H2I4Q")  # 4.3.14
LOCATOR = struct.Struct("<4sIQI")  # 4.3.15
END = struct.Struct("<4s4H2IH")  # 4.3.16

ENCRYPTED = 1 << 0
SIZES_FOLLOW = 1 << 3  # the local header has none: they stand behind the data
STORED = 0
IN_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """A record as the central directory has it: its local header begins at `header`, all ends before `limit`."""

    name: bytes
    header: int
    size: int
    limit: int


def read_records(file: BufferedReader, size: int) -> dict[str, Record]:
    """The records of a zip file of `size` bytes by name.

    Raises UnsupportedCheckpoint for a file that is truncated, compressed, encrypted or otherwise not torch.save's.
    """
    count, begin, end = _directory(file, size)
    file.seek(begin)
    data = file.read(end - begin)
    found: list[tuple[int, int, bytes]] = []
    at = 0
    for _ in range(count):
        if len(data) - at < CENTRAL.size:
            raise UnsupportedCheckpoint(f"not a sound zip file: its directory has no {count} records")
        magic, _, _, flags, method, _, _, _, *sizes, _, _, _, header = CENTRAL.unpack_from(data, at)
        packed, plain, name_length, extra_length, comment_length = sizes
        at += CENTRAL.size
        name, extra = data[at : at + name_length], data[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or at > len(data):
            raise UnsupportedCheckpoint("not a sound zip file: its directory is broken")
        packed, plain, header = _wide(extra, plain, packed, header)
        _check(name, flags, method, packed, plain)
        found.append((header, plain, name))
    if at != len(data):
        raise UnsupportedCheckpoint(f"not a sound zip file: its directory has more than {count} records")
    return _apart(sorted(found), begin)


def data_offset(file: BufferedReader, record: Record) -> int:
    """Where the bytes of a record begin; raises UnsupportedCheckpoint unless its local header agrees."""
    file.seek(record.header)
    data = file.read(LOCAL.size)
    if len(data) < LOCAL.size:
        raise UnsupportedCheckpoint(f"truncated: the record {_shown(record.name)} is not there")
    magic, _, flags, method, _, _, _, packed, plain, name_length, extra_length = LOCAL.unpack(data)
    sizes = {record.size, IN_ZIP64, 0} if flags & SIZES_FOLLOW else {record.size, IN_ZIP64}
    name = file.read(name_length)
    begin: int = record.header + LOCAL.size + name_length + extra_length
    agrees = magic == b"PK\x03\x04" and name == record.name and packed in sizes and plain in sizes
    if not agrees or flags & ENCRYPTED or method != STORED or begin + record.size > record.limit:
        raise UnsupportedCheckpoint(f"refused: the directory of the zip file lies about {_shown(record.name)}")
    return begin


def _directory(file: BufferedReader, size: int) -> tuple[int, int, int]:
    """(records, first byte, byte after the last) of the central directory, from the zip file's last bytes."""
    tail = LOCATOR.size + END.size
    file.seek(max(size - tail, 0))
    data = file.read(tail)
    if len(data) < END.size or data[-END.size :][:4] != b"PK\x05\x06":
        raise UnsupportedCheckpoint("not a checkpoint of torch.save, or truncated: a zip file without its end")
    _, disk, first_disk, here, count, length, begin, comment = END.unpack(data[-END.size :])
    end = size - END.size
    if len(data) == tail and data[:4] == b"PK\x06\x07":
        _, disk, at, disks = LOCATOR.unpack_from(data)
        file.seek(min(at, size))
        wide = file.read(END64.size)
        if len(wide) < END64.size or at + END64.size != size - tail or wide[:4] != b"PK\x06\x06" or disks != 1:
            raise UnsupportedCheckpoint("not a sound zip file: the end of its directory is not where it says")
        _, _, _, _, disk, first_disk, here, count, length, begin = END64.unpack(wide)
        end = at
    if disk or first_disk or here != count or comment or begin + length != end:
        raise UnsupportedCheckpoint("not a sound zip file: its directory is not where it says, or truncated")
    if count > MOST_RECORDS or length > LARGEST_DIRECTORY:
        raise UnsupportedCheckpoint(f"refused: the zip file has {count} records in {length} bytes of directory")
    return count, begin, end


def _wide(extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int, int]:
    """(compressed size, size, offset of the local header), from the zip64 field where they are there: 4.5.3."""
    values = [plain, packed, header]
    wanted = [i for i, value in enumerate(values) if value == IN_ZIP64]
    at = 0
    while wanted and len(extra) - at >= 4:
        tag, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if tag == 1 and len(field) >= 8 * len(wanted):
            for i, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", field), strict=True):
                values[i] = value
            break
        at += 4 + length
    return values[1], values[0], values[2]


def _check(name: bytes, flags: int, method: int, packed: int, plain: int) -> None:
    path = name.replace(b"\\", b"/")
    if b".." in path.split(b"/") or path.startswith(b"/") or b":" in path or b"\0" in path:
        raise UnsupportedCheckpoint(f"refused: the zip file has a record that leads elsewhere, {_shown(name)}")
    if flags & ENCRYPTED:
        raise UnsupportedCheckpoint(f"refused: {_shown(name)} in the zip file is encrypted")
    if method != STORED or packed != plain:
        raise UnsupportedCheckpoint(
            f"refused: {_shown(name)} in the zip file is compressed, {packed} bytes for {plain}; torch.save stores"
        )


def _apart(found: list[tuple[int, int, bytes]], directory: int) -> dict[str, Record]:
    """The records by name, once it is sure that no two share a name or a byte."""
    records: dict[str, Record] = {}
    for (header, size, name), (limit, _, _) in pairwise([*found, (directory, 0, b"")]):
        if header + LOCAL.size + len(name) + size > limit:
            raise UnsupportedCheckpoint(
                f"refused: {_shown(name)} in the zip file has {size} bytes, more than lie before what follows it"
            )
        text = name.decode("utf-8", "surrogateescape")
        if text in records:
            raise UnsupportedCheckpoint(f"refused: the zip file has {_shown(name)} twice")
        records[text] = Record(name, header, size, limit)
    return records


def _shown(name: bytes) -> str:
    return short(name.decode("utf-8", "surrogateescape"))
