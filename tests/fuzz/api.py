"""Requests made from the OpenAPI document of a running service, by schemathesis: all phases, and the checks that its
configuration says. `errors_are_problems` of `hooks` says which errors are meant.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz.house import KEY, house

CONFIG = Path(__file__).with_name("schemathesis.toml")
UNENDING = ("look_on",)
"""Operations whose answers have no end."""


def attack(seconds: int, folder: Path) -> bool:
    """So long; whether all was as documented."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": "."}
    with house(max_pixels="1048576", metrics_public="false") as service, (folder / "log").open("w") as log:
        command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG), "run"]
        command += [f"{service.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--no-color"]
        command += ["--workers", "4", "--continue-on-failure", "--max-time", str(seconds)]
        command += [part for each in UNENDING for part in ("--exclude-operation-id", each)]
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        statuses, bugs = service.statuses(), service.bugs()
        (folder / "server.log").write_bytes(service.log.read_bytes())
    text = (folder / "log").read_text(errors="replace")
    told = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    failures = re.findall(r"^  ❌ (ST\d+ .*)$", text, re.MULTILINE)
    print(f"api: {statuses.total()} requests in {seconds} s: {told}; {bugs} tracebacks; {failures or 'nothing found'}")
    return status == 0 and not bugs
