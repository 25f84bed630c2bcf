"""The long forms, one after the other or one by name: python -m tests.fuzz [readers|api] [--seconds N].

`readers` is guided by coverage and needs the extra `fuzz`; `api` talks to a service of its own, on tiny models.
Prints a line of figures for each. Status 1: something was found, and lies in `--findings`.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz import api
from tests.fuzz.targets import TARGETS


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*FORMS, []], help="all of them, if nothing is said")
    parser.add_argument("--seconds", type=int, default=600, help="of each reader, and of the API")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="these readers")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    failed = [name for name in options.what or FORMS if not FORMS[name](options)]
    sys.exit(f"fuzz: {', '.join(failed)} found something, see {options.findings}" if failed else 0)


def readers(options: argparse.Namespace) -> bool:
    """Each reader of bytes for so long, whatever the one before it came to."""
    failed = [name for name in options.only if not _guided(name, options.seconds, options.findings / name)]
    return not failed


def _guided(name: str, seconds: int, folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(seconds), str(folder)]
    with (folder / "log").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    text = (folder / "log").read_text(errors="replace")
    figures = dict(re.findall(r"stat::(\w+):\s+(\d+)", text))
    covered = re.findall(r"cov: (\d+)", text)
    print(
        f"{name}: {figures.get('number_of_executed_units', '?')} files in {seconds} s, {covered[-1:] or '?'} edges, "
        f"slowest {figures.get('slowest_unit_time_sec', '?')} s, peak {figures.get('peak_rss_mb', '?')} MB, "
        f"{'nothing found' if not status else f'status {status}'}",
        flush=True,
    )
    return not status


def _api(options: argparse.Namespace) -> bool:
    return api.attack(options.seconds, options.findings / "api")


FORMS = {"readers": readers, "api": _api}

if __name__ == "__main__":
    main()
