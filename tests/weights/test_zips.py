"""Zip files of torch.save: their records, and what is refused."""

import io
import struct
import zipfile

import pytest
import torch

from app.errors import UnsupportedCheckpoint
from app.weights.zips import Record, data_offset, read_records
from tests.store.hostile import patched, records, saved

CONTENT = {"x/data.pkl": b"N.", "x/data/0": b"abcdefgh", "x/byteorder": b"little"}


def opened(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))


def listed(data: bytes) -> dict[str, Record]:
    return read_records(opened(data), len(data))


def wide(data: bytes) -> bytes:
    """The same file with its sizes and places in zip64 fields, as of files beyond 4 GiB."""
    out, directory, count = b"", b"", 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            body, name = archive.read(info), info.filename.encode()
            extra = struct.pack("<2H3Q", 1, 24, len(body), len(body), len(out))
            fields = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, info.CRC, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra) + 4)
            directory += struct.pack("<4s6H3I5H2I", *fields, 0, 0, 0, 0, 0xFFFFFFFF) + name
            directory += struct.pack("<2H", 9, 0) + extra  # another field before it
            local = (b"PK\x03\x04", 45, 0, 0, 0, 0, info.CRC, 0xFFFFFFFF, 0xFFFFFFFF, len(name), 0)
            out += struct.pack("<4s5H3I2H", *local) + name + body
            count += 1
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), len(out))
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(out) + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return out + directory + end64 + locator + end


@pytest.mark.parametrize("form", [lambda data: data, wide], ids=["plain", "zip64"])
def test_records_are_where_they_are(form):
    data = form(records(CONTENT))
    found = listed(data)
    assert found.keys() == CONTENT.keys()
    for name, body in CONTENT.items():
        begin = data_offset(opened(data), found[name])
        assert data[begin : begin + found[name].size] == body


def test_a_file_of_torch():
    data = saved({"x": torch.arange(300.0)})
    found = listed(data)
    begin = data_offset(opened(data), found["archive/data/0"])
    assert torch.equal(
        torch.frombuffer(bytearray(data), dtype=torch.float32, offset=begin, count=300), torch.arange(300.0)
    )


def test_every_truncation_is_told():
    for form in (records(CONTENT), wide(records(CONTENT))):
        for kept in range(len(form)):
            with pytest.raises(UnsupportedCheckpoint, match=r"truncated|zip file"):
                listed(form[:kept])
        with pytest.raises(UnsupportedCheckpoint, match="truncated"):
            listed(form + b"\0")


def test_lies_of_the_end():
    sound = wide(records(CONTENT))
    for at, value in (
        (-22 - 20 + 8, struct.pack("<Q", 1 << 63)),  # the place of the zip64 end
        (-22 - 20 + 16, struct.pack("<I", 2)),  # two disks
        (-22 - 20 - 56 + 24, struct.pack("<Q", 2)),  # records on this disk
        (-22 - 20 - 56 + 40, struct.pack("<Q", 1 << 63)),  # length of the directory
        (-22 - 20 - 56 + 48, struct.pack("<Q", 0)),  # its place
    ):
        end = at + len(value)
        with pytest.raises(UnsupportedCheckpoint, match="not where it says"):
            listed(sound[:at] + value + sound[end:])


@pytest.mark.parametrize("count", [2, 4])
def test_a_directory_of_another_count(count):
    data = records(CONTENT)
    with pytest.raises(UnsupportedCheckpoint, match="its directory"):
        listed(data[:-14] + struct.pack("<2H", count, count) + data[-10:])


def test_a_record_that_lies_about_its_name_length():
    data = patched(records(CONTENT), "x/data/0", 28, b"\xff\xff")
    with pytest.raises(UnsupportedCheckpoint, match="directory is broken"):
        listed(data)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"XX"),
        (6, b"\x01\x00"),
        (8, b"\x08\x00"),
        (18, b"\x01\0\0\0"),
        (22, b"\x01\0\0\0"),
        (26, b"\x07\x00"),
        (28, b"\xff\xff"),
        (30, b"y"),
    ],
)
def test_a_local_header_that_lies(offset, value):
    data = patched(records(CONTENT), "x/data/0", offset, value, central=False)
    with pytest.raises(UnsupportedCheckpoint, match="lies about x/data/0"):
        data_offset(opened(data), listed(data)["x/data/0"])


def test_sizes_behind_the_data_may_be_absent_before_it():
    data = patched(records(CONTENT), "x/data/0", 6, b"\x08\x00", central=False)
    data = patched(data, "x/data/0", 18, bytes(8), central=False)
    found = listed(data)["x/data/0"]
    assert data[data_offset(opened(data), found) :].startswith(b"abcdefgh")


@pytest.mark.parametrize("name", ["../x", "x/../../y", "/x", "\\x", "x\\..\\y", "C:x"])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(UnsupportedCheckpoint, match="leads elsewhere"):
        listed(records({name: b""}))


@pytest.mark.parametrize("name", ["x/..y/z", "x/y..", "x/é", "x/.data/id"])
def test_names_that_do_not(name):
    assert name in listed(records({name: b""}))
