from pathlib import Path

import pytest

from app.errors import InvalidInput
from app.tools.kohya import FORMS
from app.tools.paths import Item
from app.tools.targets import cached, check_twins, part, present, twin


def test_names():
    assert part(Path("x/a.png"), 3) == Path("x/a-0003.png")
    assert twin(Path("x/a.b.npy")) == Path("x/a.b-flipped.npy")


def test_twins_are_written_over_nobody():
    check_twins([Item(Path("a"), Path("a.npy")), Item(Path("b"), Path("b.npy"))])
    with pytest.raises(InvalidInput, match=r"twins of a\.npy would"):
        check_twins([Item(Path("a"), Path("a.npy")), Item(Path("b"), Path("a-flipped.npy"))])
    with pytest.raises(InvalidInput, match="not -"):
        check_twins([Item(Path("a"), None)])


def test_what_is_there(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b-0000.png").touch()
    items = [Item(None, tmp_path / f"{name}.png") for name in "abc"] + [Item(None, None)]
    assert present(items, "decode") == {
        tmp_path / "a.png": tmp_path / "a.png",
        tmp_path / "b.png": tmp_path / "b-0000.png",
    }
    assert present(items, "encode") == {tmp_path / "a.png": tmp_path / "a.png"}


def test_caches_that_are_there(tmp_path):
    (tmp_path / "a_0064x0064_sd.npz").touch()
    items = [Item(None, tmp_path / f"{name}.npz") for name in "ab"]
    assert cached(items, tmp_path, FORMS["sd1"]) == {tmp_path / "a.npz": tmp_path / "a_0064x0064_sd.npz"}
    assert cached(items, tmp_path, FORMS["sdxl"]) == {}
