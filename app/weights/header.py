"""The header of a safetensors file: its bytes <-> what it says of the tensors behind it. Knows no tensor library.

The file is the header's length in eight bytes, the header in JSON, the data. Format:
github.com/huggingface/safetensors, README, "Format".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.text import short

PREFIX = 8  # bytes of the header's length, little-endian, which stand before it
ALIGNMENT = 8  # bytes that the data begins at a multiple of, as the reference implementation has it
MOST_PARTS = 1 << 20  # lists, objects and elements, as of 100 000 tensors: of any more, JSON may take gigabytes
LAST = 1 << 64  # no byte of a file is beyond it


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as the format codes it (`F16`, `BF16`, ...), and its bytes, counted from the data's beginning.

    Whether dtype and shape fill these bytes is for those to say who know the dtype.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says: its tensors in order of their bytes, which fill the data without gap or overlap; metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of data that the file must have behind the header."""
        return max((entry.end for entry in self.entries.values()), default=0)


def header_length(prefix: bytes) -> int:
    """Bytes of the header behind these eight."""
    return int.from_bytes(prefix[:PREFIX], "little")


def parse_header(text: bytes) -> Header:
    """The header of these bytes, without the eight before it. Raises ValueError with a one-line reason."""
    if sum(text.count(mark) for mark in (b"[", b"{", b",")) > MOST_PARTS:
        raise ValueError(f"its header of {len(text)} bytes has more than {MOST_PARTS} parts")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no map of strings")
    found = sorted(((_entry(key, item), key) for key, item in content.items()), key=lambda item: _span(item[0]))
    end = 0
    for entry, key in found:
        if entry.begin != end or entry.end < end:
            where = f"{short(key)}, bytes {entry.begin} to {entry.end}"
            raise ValueError(f"its offsets overlap or leave a gap at {where}")
        end = entry.end
    return Header({key: entry for entry, key in found}, metadata)


def format_header(header: Header) -> bytes:
    """The bytes before the data, the eight of the length among them: the same for the same header, and UTF-8."""
    content: dict[str, object] = {}
    if header.metadata:
        content["__metadata__"] = {_text(key): _text(header.metadata[key]) for key in sorted(header.metadata)}
    for key, entry in header.entries.items():
        offsets = [entry.begin, entry.end]
        content[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(PREFIX, "little") + text


def _entry(key: str, item: object) -> Entry:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{short(key)} is no UTF-8") from error
    match item:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = all(type(number) is int for number in (begin, end, *shape))
            if numbers and max(abs(begin), abs(end)) <= LAST and all(side >= 0 for side in shape):
                return Entry(dtype, tuple(shape), begin, end)
    raise ValueError(f"its header has no dtype, shape and data_offsets for {short(key)!r}")


def _span(entry: Entry) -> tuple[int, int]:
    return entry.begin, entry.end


def _text(text: str) -> str:
    """Text that every reader of UTF-8 takes: halves of surrogate pairs become escapes."""
    return text.encode(errors="backslashreplace").decode()
