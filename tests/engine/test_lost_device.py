"""A process whose device is lost ends, with a status that says so."""

import socket
import subprocess
import sys
import time

import httpx

from app.main import DEVICE_LOST_STATUS
from tests.service import latent, npy

SCRIPT = """
import sys
import torch
from pathlib import Path
from app.engine import compute
from app.main import serve
from app.server import Listening
from app.settings import Settings

def fails(*args):
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")

def run(*args):
    compute.probe = fails  # from the first forward on, nothing works any more
    fails()

compute.forward = run
sys.exit(serve(Settings(models=Path(sys.argv[1]), device="cpu"), Listening(port=int(sys.argv[2]))))
"""


def test_the_process_ends_with_its_own_status_after_the_answer(models):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(models), str(port)]) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
                wait_until_ready(client, process)
                answer = client.post("/decode", params={"model": "kl"}, content=npy(latent()))
            assert answer.status_code == 503
            assert "the service restarts" in answer.json()["detail"]
            assert process.wait(60) == DEVICE_LOST_STATUS
        finally:
            process.kill()


def wait_until_ready(client, process):
    while process.poll() is None:
        try:
            if client.get("/healthz/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the service ended with status {process.returncode}")
