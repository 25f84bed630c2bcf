import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def unbuffered(value: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {
        "PYTHONUNBUFFERED": value
    }


@pytest.mark.parametrize("value", ["", "1"])
def test_a_reader_that_has_gone_is_no_traceback(value):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "app", "fetch", "--list"]
    result = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=unbuffered(value), check=False)
    os.close(theirs)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.parametrize("value", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(value):
    command = [sys.executable, "-m", "app", "fetch", "--list"]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=unbuffered(value), check=False)
    assert result.returncode == 1
    assert re.fullmatch(rb"latentd: .*No space left on device\n", result.stderr)


def test_a_closed_stdout_is_no_traceback():
    command = f"{sys.executable} -m app fetch --list >&-"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_terminal_of_another_encoding_sees_escapes(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models" / "VAE" / "wé\nb.safetensors").write_bytes(b"torn")
    command = [sys.executable, "-m", "app", "models", "--models", tmp_path / "models"]
    result = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"w\xe9\nb  " in result.stdout
