"""`latentd compare`: one picture through many VAEs; writes the contact sheet and prints the numbers."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from app.api.schemas import Comparison
from app.errors import InvalidInput, ServiceError
from app.settings import Settings
from app.text import one_line
from app.tools.service import ANSWER_BYTES, ask, connect, content_of, replace_file
from app.wire.arrays.npz import read_zip

ZIP = "application/zip"
COLUMNS = ("MODEL", "FAMILY", "PLAN", "PSNR dB", "SSIM", "LUMINANCE", "SATURATION", "HUE deg")


def compare_models(
    image: Path, models: list[str], output: Path, settings: Settings, *, url: str | None, key: str | None, as_json: bool
) -> int:
    """Sends a picture through the models (none: all usable ones) of a service or of this process, and back.

    Writes the sheet, a PNG, to `output` and prints a table, or the numbers of POST /compare as JSON. Gives 0, or 1 when
    a model failed; its row says why. Raises InvalidInput for an output that is not called .png or has no place,
    ServiceError where the service refuses or cannot be reached, and OSError.
    """
    if output.suffix.lower() != ".png":
        raise InvalidInput(f"the contact sheet is a PNG: give it a name that ends in .png, not {output.name}")
    if output.is_dir() or not output.parent.is_dir():  # now, not once all is computed
        raise InvalidInput(f"cannot write the contact sheet to {output}: expected a file in a folder that exists")
    body = image.read_bytes()
    query = {"models": ",".join(models)} if models else {}
    answer = asyncio.run(_ask(body, query, settings, url, key))
    try:
        files = read_zip(answer, ANSWER_BYTES)
        sheet = files["sheet.png"]
        numbers = Comparison.model_validate_json(files["numbers.json"]).model_dump()
    except (InvalidInput, KeyError, ValueError) as error:
        raise ServiceError(f"expected a zip of sheet.png and numbers.json from {url}: {error}") from error
    replace_file(output, sheet)
    rows: list[dict[str, Any]] = numbers["models"]
    _print(json.dumps(numbers, indent=2) if as_json else _table(rows))
    for row in rows:
        if row["error"] is not None:
            sys.stderr.write(f"latentd: {one_line(row['model'])}: {one_line(row['error'])}\n")
    return 1 if any(row["error"] is not None for row in rows) else 0


async def _ask(body: bytes, query: dict[str, str], settings: Settings, url: str | None, key: str | None) -> bytes:
    async with connect(url, key, settings) as client:
        try:
            response = await ask(client, "POST", "/compare", params=query, content=body, headers={"Accept": ZIP})
        except httpx.HTTPError as error:
            raise ServiceError(f"{url}: {str(error) or type(error).__name__}") from error
        return content_of(response, ZIP)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS]
    for row in rows:
        if row["error"] is not None:
            lines.append((one_line(row["model"]), row["family"] or "-", "failed", *"-----"))
            continue
        lines.append(
            (
                one_line(row["model"]),
                row["family"],
                row["plan"],
                "identical" if row["identical"] else f"{row['psnr_db']:.2f}",
                f"{row['ssim']:.3f}",
                f"{row['luminance_shift']:+z.1f}",
                f"{row['saturation_shift']:+z.1f}",
                f"{row['hue_shift_degrees']:+z.1f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
