import numpy as np
import pytest
from PIL import ImageFont

from app.wire import sheet as module
from app.wire.sheet import BACKGROUND, CELL, EMPTY, GAP, LEAST, Cell, contact_sheet, fitted, shrunk

FONT = ImageFont.load_default(18)
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (10, 250, 250), (250, 10, 250), (1, 1, 1)]


def plain(colour: tuple[int, int, int], width: int = 300, height: int = 200) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def where(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what has this colour."""
    rows, columns = np.nonzero((sheet == colour).all(axis=-1))
    top, left = rows.min(), columns.min()
    height, width = rows.max() - top + 1, columns.max() - left + 1
    assert len(rows) == height * width, "not one rectangle"
    return int(top), int(left), int(height), int(width)


@pytest.mark.parametrize("n", range(1, 8))
def test_every_picture_is_on_the_sheet_in_reading_order_and_no_two_touch(n):
    sheet = contact_sheet([Cell(plain(colour), ("name", "a", "b")) for colour in COLOURS[:n]])
    places = [where(sheet, colour) for colour in COLOURS[:n]]
    assert all(place[2:] == (200, 300) for place in places)
    assert places == sorted(places)
    assert all(place[0] >= GAP and place[1] >= GAP for place in places)
    assert tuple(sheet[0, 0]) == tuple(sheet[-1, -1]) == BACKGROUND
    taken = sum((sheet == colour).all(axis=-1).sum() for colour in COLOURS[:n])
    assert taken == n * 200 * 300  # no label over a picture


@pytest.mark.parametrize(("n", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (12, (3, 4))])
def test_the_grid_is_somewhat_wider_than_high(n, grid):
    sheet = contact_sheet([Cell(plain(COLOURS[0], 512, 512), ("name", *"abc"))] * n)
    rows, columns = grid
    assert sheet.shape[1] == GAP + columns * (512 + GAP)
    assert (sheet.shape[0] - GAP) % rows == 0
    assert (sheet.shape[0] - GAP) // rows > 512


def test_every_cell_has_its_text():
    without = contact_sheet([Cell(plain(COLOURS[0]), ("", "")), Cell(None, ("", ""))])
    for index in range(2):
        lines = [("", ""), ("", "")]
        lines[index] = ("", "text")
        cells = [Cell(picture, text) for picture, text in zip((plain(COLOURS[0]), None), lines, strict=True)]
        changed = (contact_sheet(cells) != without).any(axis=-1)
        assert changed.any()
        assert not changed[: GAP + 200].any()


def test_a_picture_that_is_not_there_leaves_a_marked_place():
    sheet = contact_sheet([Cell(plain(COLOURS[0]), ("a",)), Cell(None, ("b", "failed"))])
    assert where(sheet, EMPTY)[2:] == (200, 320)
    assert contact_sheet([Cell(None, ("b",))]).shape[2] == 3


def test_pictures_of_different_sizes_share_the_cell_of_the_largest():
    sheet = contact_sheet([Cell(plain(COLOURS[0], 500, 100), ("a",)), Cell(plain(COLOURS[1], 100, 400), ("b",))])
    assert where(sheet, COLOURS[0])[2:] == (100, 500)
    assert where(sheet, COLOURS[1])[2:] == (400, 100)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),
        ((1024, 512), (CELL, 256)),
        ((513, 513), (CELL, CELL)),
        ((5000, 1), (CELL, 1)),
        ((300, 200), (300, 200)),
        ((LEAST, 10), (LEAST, 10)),
        ((32, 32), (LEAST, LEAST)),
        ((100, 60), (200, 120)),
        ((1, 1), (LEAST, LEAST)),
    ],
)
def test_large_pictures_shrink_and_small_ones_are_enlarged_by_whole_factors(size, expected):
    width, height = size
    picture = plain(COLOURS[2], width, height)
    found = shrunk(picture)
    assert (found.shape[1], found.shape[0]) == expected
    assert (found == COLOURS[2]).all()


def test_enlarging_keeps_pixels_apart():
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(shrunk(picture)[:: LEAST // 4, :: LEAST // 4], picture)


def test_long_names_lose_their_middle():
    name = "kl-f8-anime2-" + "x" * 200 + "-final.safetensors"
    text = fitted(name, FONT, 300)
    assert FONT.getlength(text) <= 300 < FONT.getlength(name)
    head, tail = text.split("...")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
    assert FONT.getlength(f"{head}xx...{tail}") > 300  # as much as fits
    assert fitted("short", FONT, 300) == "short"
    assert fitted("", FONT, 300) == ""


NAMES = [
    "動漫VAE",
    "модель",
    "נם",
    "🦊🦊",
    "a\nb\tc\x00d",
    "\udcff\ud800",
    "e\u0301",
    "\u202eabc",
    "%s {0}",
    "x" * 5000,
    "",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("freetype", [True, False])
def test_any_name_can_be_drawn_on_one_line(name, freetype, monkeypatch):
    if not freetype:  # as Pillow is where it was built without
        monkeypatch.setattr(module, "_font", lambda size: ImageFont.load_default_imagefont())
    one = contact_sheet([Cell(plain(COLOURS[0]), ("plain", "a", "b"))])
    other = contact_sheet([Cell(plain(COLOURS[0]), (name, "a", "b"))])
    assert one.shape == other.shape
    changed = np.nonzero((one != other).any(axis=(1, 2)))[0]
    if len(changed):
        assert changed.max() < GAP + 200 + GAP // 2 + 2 * module.LINE
    assert (where(other, COLOURS[0])) == where(one, COLOURS[0])


def test_without_freetype_the_bitmap_font_is_taken(monkeypatch):
    def load_default(size: float | None = None) -> object:
        if size is not None:
            raise ImportError("The _imagingft C module is not installed")
        return ImageFont.load_default_imagefont()

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    assert isinstance(module._font(18), ImageFont.ImageFont)
    contact_sheet([Cell(plain(COLOURS[0]), ("模型", "hue +1.0°"))])


def test_the_same_cells_give_the_same_sheet():
    cells = [Cell(plain(colour), ("name",)) for colour in COLOURS]
    np.testing.assert_array_equal(contact_sheet(cells), contact_sheet(cells))
