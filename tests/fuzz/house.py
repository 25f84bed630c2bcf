"""A service of its own for what attacks it: another process, on tiny models that come back when they are deleted."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from safetensors.torch import save_file

from tests.demo import free_port, stop, wait_until_ready
from tests.store.weights import state_of

KEY = "fuzz"
"""The API key and the admin's: attacks on who may do what have tests of their own."""
MODELS = {"kl": ("sd1", 3), "tiny": ("taesd", 3), "layered": ("wan21", 4)}


@dataclass(frozen=True)
class House:
    """Where it is."""

    url: str
    models: Path
    log: Path
    pid: int

    def statuses(self) -> Counter[str]:
        """How many requests were answered with each status, as its log says."""
        words = (line.split() for line in self.log.read_text(errors="replace").splitlines() if " app.access: " in line)
        return Counter(next((word for word in line[5:] if len(word) == 3 and word.isdigit()), "?") for line in words)

    def bugs(self) -> int:
        """Tracebacks in its log."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")

    def memory(self) -> int:
        """Bytes that its process has now."""
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most that it had since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@contextmanager
def house(**settings: str) -> Iterator[House]:
    """A service on a free port of the loopback; it must end by itself with status 0."""
    with tempfile.TemporaryDirectory() as folder:
        models, kept, log = (Path(folder) / name for name in ("models", "kept", "log"))
        models.mkdir()
        kept.mkdir()
        for name, (family, channels) in MODELS.items():
            more = {"pixel_channels": channels} if channels != 3 else {}
            save_file(state_of(family, **more), kept / f"{name}.safetensors")
            shutil.copy(kept / f"{name}.safetensors", models)
        port = free_port()
        command = [
            str(Path(sys.executable).with_name("latentd")),
            "serve",
            "--port",
            str(port),
            "--models",
            str(models),
        ]
        given = {"device": "cpu", "default_model": "kl", "api_keys": KEY, "admin_key": KEY, **settings}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTD_")}
        environment |= {f"LATENTD_{key.upper()}": value for key, value in given.items()}
        ended = threading.Event()
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
            restoring = threading.Thread(target=_restore, args=(kept, models, ended))
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                    wait_until_ready(client, process)
                restoring.start()
                yield House(f"http://127.0.0.1:{port}", models, log, process.pid)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, log.read_text(errors="replace")[-2000:]
            finally:
                ended.set()
                stop(process)


def _restore(kept: Path, models: Path, ended: threading.Event) -> None:
    """What was deleted comes back, whole at once."""
    while not ended.wait(0.5):
        for file in kept.iterdir():
            if not (models / file.name).exists():
                shutil.copy(file, models / "coming")
                (models / "coming").rename(models / file.name)
