"""The contact sheet: pictures of one motif side by side, each with a few lines of text below it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

CELL = 512
"""The longest side of a picture on the sheet, in pixels; larger ones are scaled down to it, by Lanczos."""
LEAST = 256
"""Smaller pictures are enlarged towards this by a whole factor, pixel by pixel: a sheet shows them as they are."""
LABEL = 320
"""The least width of a cell: room for its text."""
GAP = 16
LINE = 25
SIZES = (21, 17)
"""Points of the first line of a label and of the others."""
BACKGROUND, TITLE, TEXT, EMPTY = (119, 119, 119), (255, 255, 255), (232, 232, 232), (104, 104, 104)
"""Mid grey, L* 50: beside black or white the pictures would seem paler or more vivid than they are."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture of at most `CELL` pixels a side, as `shrunk` makes it, or None where there is none; its label."""

    picture: npt.NDArray[np.uint8] | None
    lines: tuple[str, ...]


def shrunk(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A picture (H, W, 3) in the size that it has on a sheet."""
    height, width, _ = picture.shape
    longest = max(height, width)
    if longest <= CELL:
        factor = max(1, LEAST // longest)
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    size = max(1, round(width * CELL / longest)), max(1, round(height * CELL / longest))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def contact_sheet(cells: Sequence[Cell]) -> npt.NDArray[np.uint8]:
    """The cells row by row as one picture (H, W, 3), somewhat wider than high. Too long lines lose their middle."""
    fonts = [_font(size) for size in SIZES]
    sides = [cell.picture.shape[:2] for cell in cells if cell.picture is not None]
    high = max((height for height, _ in sides), default=LEAST)
    wide = max([LABEL, *(width for _, width in sides)])
    label = LINE * max(len(cell.lines) for cell in cells) + GAP // 2
    columns = _columns(len(cells), wide + GAP, high + label + GAP)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (GAP + columns * (wide + GAP), GAP + rows * (high + label + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        left = GAP + index % columns * (wide + GAP)
        top = GAP + index // columns * (high + label + GAP)
        if cell.picture is None:
            draw.rectangle((left, top, left + wide - 1, top + high - 1), fill=EMPTY)
        else:
            height, width, _ = cell.picture.shape
            sheet.paste(Image.fromarray(cell.picture), (left + (wide - width) // 2, top + (high - height) // 2))
        for number, line in enumerate(cell.lines):
            font, fill = (fonts[0], TITLE) if number == 0 else (fonts[1], TEXT)
            at = (left, top + high + GAP // 2 + number * LINE)
            draw.text(at, fitted(line, font, wide), fill, font)
    return np.array(sheet)


def fitted(text: str, font: Font, width: int) -> str:
    """One line of at most `width` pixels that the font can draw: without its middle, if need be."""
    text = _drawable(text, font)
    if font.getlength(text) <= width:
        return text
    shorter, longer = 0, len(text) - 1  # characters kept; fewest that are sure to fit, most that may
    while shorter < longer:
        kept = (shorter + longer + 1) // 2
        if font.getlength(_without_middle(text, kept)) <= width:
            shorter = kept
        else:
            longer = kept - 1
    return _without_middle(text, shorter)


def _without_middle(text: str, kept: int) -> str:
    return f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"


def _drawable(text: str, font: Font) -> str:
    """Control characters and lone surrogates, which break a line or the renderer, become question marks."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


def _font(size: int) -> Font:
    """Pillow's own font; the small bitmap one where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except ImportError:
        return ImageFont.load_default()


def _columns(cells: int, width: int, height: int) -> int:
    """How many columns bring the sheet near to 4:3 while they leave few places empty."""

    def badness(columns: int) -> float:
        rows = -(-cells // columns)
        shape = abs(math.log(columns * width / (rows * height) / (4 / 3)))
        return shape + 1.5 * (1 - cells / (columns * rows))  # weighed by eye, on sheets of 2 to 20

    return min(range(1, cells + 1), key=badness)
