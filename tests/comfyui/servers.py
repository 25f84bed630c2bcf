"""ComfyUI and latentd as programs of their own, and ComfyUI's HTTP API."""

import io
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.demo import stop

START_SECONDS = 180.0
PROMPT_SECONDS = 300.0
LOOK_SECONDS = 0.05

Graph = dict[str, dict[str, Any]]


@contextmanager
def running(command: Sequence[str], folder: Path, environment: dict[str, str], log: Path, ready: str) -> Iterator[None]:
    """A program, from when `ready` answers until it is stopped."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LATENTD_")} | environment
    with (
        log.open("wb") as sink,
        # Its own session: Ctrl-C is for this test, which then stops it.
        subprocess.Popen(command, cwd=folder, env=clean, stdout=sink, stderr=sink, start_new_session=True) as process,
    ):
        try:
            end = time.monotonic() + START_SECONDS
            while not _answers(ready):
                if process.poll() is not None or time.monotonic() > end:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    raise RuntimeError(f"{command[0]} did not start; the end of its log:\n{tail}")
                time.sleep(LOOK_SECONDS)
            yield
        finally:
            stop(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def latentd(models: Path, port: int, log: Path, **settings: str) -> Any:
    """The service of this tree."""
    command = [sys.executable, "-m", "app", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--models", str(models), "--device", "cpu"]
    root = Path(__file__).resolve().parents[2]
    environment = {f"LATENTD_{name.upper()}": value for name, value in settings.items()}
    return running(command, root, environment, log, f"http://127.0.0.1:{port}/healthz/ready")


def comfyui(source: Path, python: Path, base: Path, port: int, log: Path, **settings: str) -> Any:
    """ComfyUI with models, nodes and pictures in `base`."""
    command = [str(python), str(source / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    environment = {f"LATENTD_{name.upper()}": value for name, value in settings.items()}
    return running(command, source, environment, log, f"http://127.0.0.1:{port}/system_stats")


@dataclass(frozen=True)
class Outcome:
    """How a graph ended."""

    seconds: float
    error: str  # what ComfyUI's window shows; empty where all went well
    interrupted: bool
    files: tuple[dict[str, str], ...]


class Comfy:
    """The API of a ComfyUI."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def get(self, path: str, **query: str) -> Any:
        answer = self.http.get(path, params=query)
        answer.raise_for_status()
        return answer.json()

    def queue(self, graph: Graph) -> str:
        answer = self.http.post("/prompt", json={"prompt": graph, "client_id": uuid.uuid4().hex})
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(f"ComfyUI refused a graph: {answer.text}")
        name: str = answer.json()["prompt_id"]
        return name

    def ended(self, prompt: str) -> Outcome:
        """Waits for a graph's end."""
        end = time.monotonic() + PROMPT_SECONDS
        while not (entry := self.get(f"/history/{prompt}").get(prompt)):
            if time.monotonic() > end:
                raise RuntimeError(f"a graph did not end within {PROMPT_SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)
        messages = dict(entry["status"]["messages"])
        times = [message["timestamp"] for message in messages.values()]
        failed = messages.get("execution_error", {})
        files = tuple(file for output in entry["outputs"].values() for kind in output.values() for file in kind)
        return Outcome(
            seconds=(max(times) - min(times)) / 1e3,
            error=failed.get("exception_message", "").strip(),
            interrupted="execution_interrupted" in messages,
            files=files,
        )

    def run(self, graph: Graph) -> Outcome:
        return self.ended(self.queue(graph))

    def view(self, file: dict[str, str]) -> bytes:
        answer = self.http.get("/view", params=file)
        answer.raise_for_status()
        return answer.content

    def pictures(self, outcome: Outcome) -> np.ndarray:
        """uint8 (N, H, W, 3) of what SaveImage wrote."""
        return np.stack([np.asarray(Image.open(io.BytesIO(self.view(file))).convert("RGB")) for file in outcome.files])
