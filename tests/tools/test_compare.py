import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from app.errors import InvalidInput, ServiceError
from app.settings import Settings
from app.tools import compare as module
from app.tools.compare import compare_models
from app.wire.arrays.npz import write_zip
from tests.service import listening, picture, saying, told


@pytest.fixture
def image(tmp_path) -> Path:
    path: Path = tmp_path / "picture.png"
    path.write_bytes(picture(35, 33))
    return path


def zipped(numbers: bytes) -> bytes:
    return told(200, "application/zip", write_zip([("sheet.png", b""), ("numbers.json", numbers)]))


def run(image, output, models, *names, url=None, as_json=False) -> int:
    settings = Settings(models=models, device="cpu")
    return compare_models(image, list(names), output, settings, url=url, key=None, as_json=as_json)


def test_it_writes_the_sheet_and_prints_a_table(models, image, tmp_path, capsys):
    output = tmp_path / "sheet.png"
    output.write_bytes(b"an older one")
    assert run(image, output, models) == 0
    with Image.open(output) as sheet:
        assert sheet.format == "PNG"
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["MODEL", "FAMILY", "PLAN"]
    assert [row.split()[:3] for row in rows] == [["kl", "sd1", "fp32/whole"], ["tiny", "taesd", "fp32/whole"]]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "sheet.png"]


def test_json_is_what_the_service_says(models, image, tmp_path, capsys):
    assert run(image, tmp_path / "sheet.PNG", models, "tiny", "kl", as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image_size"] == "35x33"
    assert [row["model"] for row in found["models"]] == ["tiny", "kl"]
    assert all(isinstance(row["psnr_db"], float) for row in found["models"])


def test_a_model_that_fails_has_its_line_and_the_status_tells(models, image, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    (folder / "VAE" / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert run(image, tmp_path / "sheet.png", folder, "torn", "kl") == 1
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["torn", "-"], ["kl", "sd1"]]
    assert err.startswith("latentd: torn: ")
    assert err.count("\n") == 1
    assert (tmp_path / "sheet.png").exists()


def test_a_running_service_does_it_too(models, image, tmp_path, capsys):
    with listening(models) as (_, port):
        assert run(image, tmp_path / "sheet.png", Path("nowhere"), "kl", url=f"http://127.0.0.1:{port}") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("kl ")


def test_what_cannot_be_done_is_one_error_and_no_file(models, image, tmp_path):
    output = tmp_path / "sheet.png"
    with pytest.raises(ServiceError, match="nobody"):
        run(image, output, models, "nobody")
    with pytest.raises(InvalidInput, match=r"\.png, not sheet\.jpg"):
        run(image, tmp_path / "sheet.jpg", models)
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "none.png", output, models)
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1"):
        run(image, output, models, url="http://127.0.0.1:1")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ServiceError, match="PNG"):
        run(tmp_path / "text.png", output, models)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "text.png"]


@pytest.mark.parametrize("name", ["no/folder/sheet.png", "folder.png"])
def test_a_sheet_that_has_no_place_is_refused_before_anything_is_asked(image, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidInput, match=name):
        run(image, tmp_path / name, Path("nowhere"), url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    "answer",
    [
        told(200, "application/zip", b"PK no zip"),
        told(200, "text/html", b"<html>"),
        told(404, "application/zip"),
        zipped(b"{}"),
        zipped(b'{"image_size": "1x1", "models": [{}]}'),
    ],
    ids=["torn", "html", "404", "no numbers", "no model"],
)
def test_somebody_elses_service_is_one_error(image, tmp_path, answer):
    with saying(answer) as url, pytest.raises(ServiceError, match="zip"):
        run(image, tmp_path / "sheet.png", Path("nowhere"), url=url)
    assert not (tmp_path / "sheet.png").exists()


def test_a_name_with_a_line_break_keeps_to_its_line():
    row = {"model": "a\nb", "family": "sd1", "error": "no"}
    assert module._table([row]).splitlines()[1].split()[:2] == ["a\\nb", "sd1"]


def test_numbers_in_the_table():
    row = {
        "model": "a",
        "family": "sd1",
        "plan": "fp32/whole",
        "identical": False,
        "psnr_db": 31.0049,
        "ssim": 0.9,
        "luminance_shift": -0.04,
        "saturation_shift": -8.26,
        "hue_shift_degrees": 2.0,
        "error": None,
    }
    same = {**row, "identical": True, "psnr_db": None}
    lines = module._table([row, same]).splitlines()
    assert lines[1].split() == ["a", "sd1", "fp32/whole", "31.00", "0.900", "+0.0", "-8.3", "+2.0"]
    assert lines[2].split()[3] == "identical"
