"""The header of a safetensors file, there and back; what lies in it is told in tests of those who read it."""

import json
import subprocess
import sys

import pytest
from safetensors.numpy import save

from app.weights.header import LAST, PREFIX, Entry, Header, format_header, header_length, parse_header

HEADER = Header({"a": Entry("F16", (2, 3), 0, 12), "b": Entry("F32", (), 12, 16)}, {"x": "ü", "k": "1"})


def test_there_and_back():
    data = format_header(HEADER)
    assert header_length(data) == len(data) - PREFIX
    assert len(data) % 8 == 0
    assert parse_header(data[PREFIX:]) == HEADER
    assert parse_header(data[PREFIX:]).data_bytes == 16


def test_the_same_header_is_the_same_bytes():
    turned = Header(HEADER.entries, dict(reversed(HEADER.metadata.items())))
    assert format_header(turned) == format_header(HEADER)


def test_the_order_is_that_of_the_data_whatever_the_header_s():
    text = json.dumps({"b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}, "__metadata__": None, "a": A})
    assert list(parse_header(text.encode()).entries) == ["a", "b"]


A = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def test_what_the_library_writes():
    import numpy as np

    data = save({"a": np.zeros((2, 3), np.float16), "e": np.zeros((0, 3), np.float32)}, {"k": "v"})
    header = parse_header(data[PREFIX : PREFIX + header_length(data)])
    assert header.entries["a"] == Entry("F16", (2, 3), 0, 12)
    assert header.data_bytes == 12
    assert header.metadata == {"k": "v"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_offsets": [1, 2]}, "overlap or leave a gap at a, bytes 1 to 2"),
        ({"data_offsets": [0, -1]}, "overlap or leave a gap"),
        ({"data_offsets": [0, LAST + 1]}, "no dtype, shape and data_offsets for 'a'"),
        ({"data_offsets": [False, True]}, "no dtype, shape and data_offsets"),
        ({"shape": [-1]}, "no dtype, shape and data_offsets"),
        ({"dtype": None}, "no dtype, shape and data_offsets"),
    ],
)
def test_an_entry_that_lies(change, reason):
    with pytest.raises(ValueError, match=reason):
        parse_header(json.dumps({"a": A | change}).encode())


def test_it_needs_no_torch():
    code = "import sys, app.weights.header; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
