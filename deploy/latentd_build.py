"""The build backend: setuptools, but in a wheel the package `app` is called `latentd`.

`app` is its folder's name in the repository, and nothing to put into everybody's site-packages: many programs have a
package of that name. An editable install keeps it.
"""

import base64
import hashlib
import re
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # what else a frontend asks for; no metadata before the wheel: it names the command
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]

OURS = re.compile(rb"""^(\s*from )app(?=[. ])|(getLogger\(["'])app(?=\.)|(= )app(?=\.cli:)""", re.MULTILINE)
"""Where a file names the package: imports, which are all of this one form, loggers, and the console script."""


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]  # PEP 517's
    """As setuptools', renamed."""
    name = build_meta.build_wheel(wheel_directory, config_settings)
    rename(Path(wheel_directory) / name)
    return name


def rename(wheel: Path) -> None:
    """Writes a wheel anew with its package renamed, and its RECORD with it."""
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist() if not entry.is_dir()}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    del files[record]
    renamed = {renamed_path(name): renamed_content(name, content) for name, content in files.items()}
    lines = [f"{name},sha256={digest(content)},{len(content)}" for name, content in renamed.items()]
    renamed[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in renamed.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)


def renamed_path(name: str) -> str:
    """`app/cli.py` as `latentd/cli.py`."""
    return f"latentd/{name.removeprefix('app/')}" if name.startswith("app/") else name


def renamed_content(name: str, content: bytes) -> bytes:
    """A file that names the package, with its other name."""
    if name.endswith("top_level.txt"):
        return b"latentd\n"
    if name.endswith((".py", "entry_points.txt")):
        return OURS.sub(lambda found: b"".join(part or b"" for part in found.groups()) + b"latentd", content)
    return content


def digest(content: bytes) -> str:
    """As RECORD has it: urlsafe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
