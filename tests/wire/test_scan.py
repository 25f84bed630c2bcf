import re

import pytest

from app.wire import scan


@pytest.mark.parametrize("at", [0, 1, 5, 62, 63, 64, 65, 190])
def test_a_match_is_found_across_pieces(monkeypatch, at):
    monkeypatch.setattr(scan, "PIECE", 64)
    body = bytearray(200)
    body[at : at + 4] = b"abcd"
    for form in (bytes(body), body, memoryview(body)):
        found = scan.search(re.compile(b"abcd"), form, 0, 4)
        assert found is not None
        assert found.start() == at
        assert scan.search(re.compile(b"abcd"), form, at + 1, 4) is None
        assert scan.count(b"abcd", form) == 1


def test_many_are_counted_once_each(monkeypatch):
    monkeypatch.setattr(scan, "PIECE", 64)
    assert scan.count(b"abc", b"abc" * 1000) == 1000
