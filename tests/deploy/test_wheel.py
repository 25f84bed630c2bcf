"""What `pip install latentd` brings: the command, and one package that is named after it."""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest

from app import __version__

ROOT = Path(__file__).parents[2]
SOURCES = ("app", "deploy/latentd_build.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    (tree / "deploy").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], check=True)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True)
    return site


def run(site: Path, *arguments: str) -> str:
    """In a folder where no `app` is, with the packages of this environment behind the wheel's."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_one_package_and_all_of_its_files(wheel):
    assert wheel.name == f"latentd-{__version__}-py3-none-any.whl"
    mine = {path.relative_to(ROOT / "app") for path in (ROOT / "app").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.split("/")[0] for name in names} == {"latentd", f"latentd-{__version__}.dist-info"}
        assert {Path(name).relative_to("latentd") for name in names if name.startswith("latentd/")} == {
            path for path in mine if "__pycache__" not in path.parts
        }
        for name in names:
            if name.endswith(".py"):
                code = archive.read(name).decode()
                assert not re.search(r"^\s*(from|import) app\b|[\"']app\.", code, re.MULTILINE), name


def test_its_record_is_true(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        rows = {name: (digest, size) for name, digest, size in csv.reader(archive.read(record).decode().splitlines())}
        assert set(rows) == set(archive.namelist())
        for name, (digest, size) in rows.items():
            if name != record:
                content = archive.read(name)
                assert urlsafe_b64decode(digest.removeprefix("sha256=") + "=") == hashlib.sha256(content).digest()
                assert int(size) == len(content)


def test_the_command_runs_without_the_repository(site, models):
    assert run(site, "-m", "latentd", "--version") == f"latentd {__version__}\n"
    assert run(site, str(site / "bin" / "latentd"), "--version") == f"latentd {__version__}\n"
    assert "kl " in run(site, "-m", "latentd", "models", "--models", str(models))
    code = "import sys, latentd.main; print(latentd.main.__file__, any(n.split('.')[0] == 'app' for n in sys.modules))"
    said = run(site, "-c", code)
    assert said == f"{site / 'latentd' / 'main.py'} False\n"
