"""`make demo`: starts the real service, sends a picture through /encode and back through /decode, and stops it.

Prints what came back and how close it is. Everything it writes lies in demo-output/.
"""

import argparse
import io
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo-output"
LOG = OUTPUT / "server.log"
READY_SECONDS = 120.0  # importing torch from a cold disk is most of it
STOP_SECONDS = 60.0
LEAST_PSNR = 15.0  # dB; a picture that was mangled on the way is well below, the smallest VAE well above


class Failed(Exception):
    """The demo did not show what it is there to show; the text says why."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def service(models: Path, log_path: Path, device: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A service on a free port, and a client for it; gone afterwards whatever happens."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("latentd")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--models", str(models), "--device", device]
    # A caller's settings, keys for one, are for another service than this.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTD_")}
    with (
        log_path.open("wb") as log,
        # Its own session: Ctrl-C is for the demo, which then stops the service.
        subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process,
        # trust_env: a proxy has no business between this machine and itself.
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):
        try:
            yield client, process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a program to end, and ends it where it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> float:
    """Seconds until /healthz/ready answered 200."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < READY_SECONDS:
        if process.poll() is not None:
            raise Failed(f"the service ended with status {process.returncode} before it was ready")
        try:
            if client.get("/healthz/ready", timeout=5).status_code == httpx.codes.OK:
                return waited
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise Failed(f"the service was not ready after {READY_SECONDS:.0f} s")


def post(client: httpx.Client, path: str, body: bytes, **query: str) -> httpx.Response:
    answer = client.post(path, content=body, params=query, headers={"Content-Type": "application/octet-stream"})
    if answer.status_code != httpx.codes.OK:
        raise Failed(f"POST {path} answered {answer.status_code}: {answer.text}")
    return answer


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of 8-bit pictures of one shape."""
    if a.shape != b.shape:
        raise Failed(f"the picture is {a.shape}, what came back is {b.shape}")
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def report(step: str, answer: httpx.Response, seconds: float, path: Path, shape: str) -> None:
    headers = answer.headers
    print(f"{step}  {seconds * 1e3:.0f} ms  X-Model: {headers['X-Model']}  X-Plan: {headers['X-Plan']}")
    print(f"        {shape}, {len(answer.content):,} bytes  {path}")


def round_trip(client: httpx.Client, picture: Path, model: str) -> float:
    """Encodes the picture, decodes what comes back, and returns the PSNR."""
    start = time.monotonic()
    encoded = post(client, "/encode", picture.read_bytes(), model=model)
    seconds = time.monotonic() - start
    latents_path = OUTPUT / f"{picture.stem}.npy"
    latents_path.write_bytes(encoded.content)
    latents = np.load(io.BytesIO(encoded.content), allow_pickle=False)
    report("encode", encoded, seconds, latents_path, f"{latents.dtype} {latents.shape}")

    start = time.monotonic()
    decoded = post(client, "/decode", encoded.content, model=model, size=encoded.headers["X-Image-Size"])
    seconds = time.monotonic() - start
    decoded_path = OUTPUT / f"{picture.stem}.decoded.png"
    decoded_path.write_bytes(decoded.content)
    with Image.open(picture) as before, Image.open(decoded_path) as after:
        report("decode", decoded, seconds, decoded_path, f"{after.format} {after.width}x{after.height}")
        return psnr(np.asarray(before.convert("RGB")), np.asarray(after.convert("RGB")))


def terminated(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)  # through `finally`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=ROOT / "tests" / "pictures" / "astronaut.png")
    parser.add_argument("--model", default="latentd-small", help="the embedded default")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if not args.picture.is_file():
        print(f"demo: no picture {args.picture}", file=sys.stderr)
        return 1
    OUTPUT.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, terminated)
    try:
        with service(ROOT / "models", LOG, args.device) as (client, process):
            waited = wait_until_ready(client, process)
            print(f"serving {client.base_url} after {waited:.1f} s  {args.picture}")
            value = round_trip(client, args.picture, args.model)
        if process.returncode not in (0, -signal.SIGTERM):
            raise Failed(f"the service was to stop within {STOP_SECONDS:.0f} s; its status was {process.returncode}")
        print(f"PSNR    {value:.2f} dB")
        if value < LEAST_PSNR:
            raise Failed(f"{value:.2f} dB is below the {LEAST_PSNR} dB of any working round trip")
    except (Failed, httpx.TransportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        tail = LOG.read_text(errors="replace").splitlines()[-20:]
        print(f"the end of {LOG}:", *tail, sep="\n  ", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
