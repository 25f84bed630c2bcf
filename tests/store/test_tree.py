"""What a look sees of a folder, and when a file counts as whole."""

import os
import time
from pathlib import Path

import pytest

from app.store.tree import Rest, Stamp, walk

HERE = Path("x.safetensors")


@pytest.fixture
def clock(monkeypatch):
    """Both clocks, moved by hand."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(time, "time", lambda: Clock.now + 1e9)
    return Clock


def written(when: float, size: int = 1, inode: int = 1) -> Stamp:
    return Stamp(HERE, size, int((when + 1e9) * 1e9), inode, 0)


def test_an_old_file_that_comes_is_whole_at_once(clock):
    rest = Rest()
    rest.note([written(clock.now - 10)])
    assert rest.rests(rest.stamps([HERE]), 0.5, 1.0)


def test_a_fresh_file_is_whole_once_it_was_left_alone(clock):
    rest = Rest()
    rest.note([written(clock.now)])
    assert not rest.rests(rest.stamps([HERE]), 0.5, 1.0)
    clock.now += 0.4
    rest.note([written(1000.4, size=2)])
    clock.now += 0.4
    rest.note([written(1000.4, size=2)])
    assert not rest.rests(rest.stamps([HERE]), 0.5, 1.0)
    clock.now += 0.1
    assert rest.rests(rest.stamps([HERE]), 0.5, 1.0)


def test_of_a_file_written_in_place_the_time_of_writing_is_not_believed(clock):
    """The clock of a file server may be behind, and cp -p ends by setting an old time."""
    rest = Rest()
    rest.note([written(clock.now - 3600)])
    for size in range(2, 6):
        clock.now += 0.2
        rest.note([written(clock.now - 3600, size)])
        assert not rest.rests(rest.stamps([HERE]), 0.5, 1.0)
    clock.now += 0.6
    assert rest.rests(rest.stamps([HERE]), 0.5, 1.0)


def test_a_file_moved_over_another_is_not_written_in_place(clock):
    rest = Rest()
    rest.note([written(clock.now - 10)])
    rest.note([written(clock.now - 5, inode=2)])
    assert rest.rests(rest.stamps([HERE]), 0.5, 1.0)


def test_a_time_of_writing_in_the_future_is_no_obstacle(clock):
    rest = Rest()
    rest.note([written(clock.now + 3600)])
    assert not rest.rests(rest.stamps([HERE]), 0.5, 1.0)
    clock.now += 0.6
    assert rest.rests(rest.stamps([HERE]), 0.5, 1.0)


def test_a_file_that_has_gone_keeps_nobody_waiting():
    rest = Rest()
    rest.note([])
    assert rest.stamps([HERE]) == (None,)
    assert rest.rests((None,), 0.5, 1.0)


def test_a_walk_of_the_same_files_gives_the_same_stamps(tmp_path):
    (tmp_path / "VAE").mkdir()
    for name in ("a.pt", "b.safetensors", "c.txt", ".d.pt"):
        (tmp_path / "VAE" / name).write_bytes(b"1")
    before = walk([tmp_path], {})
    assert [item.path.name for item in before.values()] == ["a.pt", "b.safetensors"]
    os.utime(tmp_path / "VAE" / "b.safetensors", ns=(1, 1))
    after = walk([tmp_path], before)
    same, other = (str(tmp_path / "VAE" / name) for name in ("a.pt", "b.safetensors"))
    assert after[same] is before[same]
    assert after[other] != before[other]


def test_a_folder_that_is_not_there(tmp_path):
    assert walk([tmp_path / "nothing"], {}) == {}
