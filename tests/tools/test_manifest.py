from dataclasses import replace
from typing import Any

from app.tools.manifest import NAME, Made, Maker, Manifest

MAKER = Maker("encode", "kl", "ab" * 32, "sd1", "config", {"latents": "raw"})


def test_what_is_noted_is_read_back(tmp_path):
    assert Manifest(tmp_path).made("a.npy") is None
    assert Manifest(tmp_path / "nothing").made("a.npy") is None
    manifest, other = Manifest(tmp_path), replace(MAKER, sha256="cd" * 32)
    manifest.note("a.npy", MAKER, "31x20")
    manifest.note("deep/b.npy", MAKER, None)
    manifest.note("a.npy", other, None)
    for each in (manifest, Manifest(tmp_path)):
        assert each.made("a.npy") == Made(other)
        assert each.made("deep/b.npy") == Made(MAKER)
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 5  # three files, two makers


def test_a_maker_is_its_weights_family_and_options_whatever_they_are_called():
    assert replace(MAKER, model="copy", family_source="hash").id == MAKER.id
    others: tuple[dict[str, Any], ...] = ({"sha256": "0"}, {"family": "sdxl"}, {"op": "decode"}, {"options": {}})
    assert len({MAKER.id, *(replace(MAKER, **other).id for other in others)}) == 5
    assert str(MAKER) == "kl (sd1, sha256 ababababab, latents=raw)"


def test_a_torn_line_is_the_only_loss(tmp_path):
    manifest = Manifest(tmp_path)
    for name in ("a.npy", "b.npy"):
        manifest.note(name, MAKER, None)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    again = Manifest(tmp_path)
    assert (again.made("a.npy"), again.made("b.npy")) == (Made(MAKER), None)
    again.note("b.npy", MAKER, "1x2")
    assert Manifest(tmp_path).made("b.npy") == Made(MAKER, "1x2")


def test_lines_of_somebody_else_are_passed_over(tmp_path):
    (tmp_path / NAME).write_text(
        '[]\n{"id": "x", "maker": {"y": 1}}\n{"file": 1, "id": "x"}\nnull\n{"file": "a", "id": "x"}\n'
    )
    assert Manifest(tmp_path).made("a") is None


def test_two_at_a_time_lose_nothing(tmp_path):
    one, two = Manifest(tmp_path), Manifest(tmp_path)
    for index in range(3):
        one.note(f"one{index}", MAKER, None)
        two.note(f"two{index}", MAKER, None)
    both = Manifest(tmp_path)
    assert all(both.made(f"{name}{index}") == Made(MAKER) for name in ("one", "two") for index in range(3))
