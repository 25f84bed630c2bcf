"""The main job through the real server process, on real files."""

import io
import re
import shutil
import subprocess

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.demo import ROOT, psnr, service, wait_until_ready
from tests.store.weights import state_of, write

PICTURE = ROOT / "tests" / "pictures" / "astronaut.png"
EMBEDDED = ROOT / "models" / "VAE" / "latentd-small.safetensors"
TAEF2 = sorted((ROOT.parent / "shared" / "weights").glob("taef2_*.pth"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    (models / "VAE").mkdir()
    shutil.copy(EMBEDDED, models / "VAE")
    return models


@pytest.fixture(scope="module")
def client(folder):
    with service(folder, folder / "server.log", "cpu") as (client, process):
        wait_until_ready(client, process)
        yield client
    assert process.returncode == 0


def round_trip(client: httpx.Client, **query: str) -> tuple[np.ndarray, float]:
    """(latents, PSNR in dB) of the picture."""
    encoded = client.post("/encode", content=PICTURE.read_bytes(), params=query)
    assert encoded.status_code == 200, encoded.text
    decoded = client.post("/decode", content=encoded.content, params=query)
    assert decoded.status_code == 200, decoded.text
    with Image.open(PICTURE) as before, Image.open(io.BytesIO(decoded.content)) as after:
        return np.load(io.BytesIO(encoded.content)), psnr(np.asarray(before.convert("RGB")), np.asarray(after))


def names(client: httpx.Client) -> list[str]:
    return [model["name"] for model in client.get("/models").json()["models"]]


def test_the_embedded_default_does_the_main_job(client):
    latents, quality = round_trip(client)
    assert latents.shape == (1, 4, 64, 64)
    assert latents.dtype == np.float16
    assert 0.5 < latents.astype(np.float32).std() < 2
    assert quality > 22


def test_a_picture_keeps_its_odd_size_and_its_place_whatever_the_fit(client):
    with Image.open(PICTURE) as whole:
        picture = whole.convert("RGB").crop((10, 20, 461, 320))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    quality = {}
    for fit in ("pad", "resize", "crop"):
        latents = {"Accept": "application/x-safetensors"}
        encoded = client.post("/encode", content=buffer.getvalue(), params={"fit": fit}, headers=latents)
        assert encoded.headers["x-image-size"] == "451x300"
        decoded = client.post("/decode", content=encoded.content)
        x, y = map(int, decoded.headers.get("x-image-offset", "0,0").split(","))
        with Image.open(io.BytesIO(decoded.content)) as after:
            assert after.size == ((448, 296) if fit == "crop" else (451, 300))
            place = (x, y, x + after.width, y + after.height)
            quality[fit] = psnr(np.asarray(picture.crop(place)), np.asarray(after))
    assert quality["resize"] > quality["pad"] - 1
    assert quality["crop"] > quality["pad"] - 1


@pytest.mark.skipif(len(TAEF2) != 2, reason="the TAEF2 weights are not there")
def test_weights_dropped_into_the_folder_are_served_at_once(client, folder):
    assert "taef2" not in names(client)
    for half in TAEF2:
        shutil.copy(half, folder / "VAE")
    assert "taef2" in names(client)
    latents, quality = round_trip(client, model="taef2")
    assert latents.shape == (1, 128, 32, 32)  # as FLUX.2's transformer sees them
    assert quality >= 30
    raw, same = round_trip(client, model="taef2", latents="raw")
    assert raw.shape == (1, 32, 64, 64)
    assert same == pytest.approx(quality, abs=0.1)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/encode?model=latentd-small", PICTURE.read_bytes()[:5000], 400),
        ("/encode?model=latentd-small", b"this is no picture", 415),
        ("/decode?model=latentd-small", b"neither is this an array", 415),
        ("/decode?model=nobody", b"", 404),
    ],
)
def test_bad_input_is_refused_and_the_server_serves_on(client, path, body, status):
    answer = client.post(path, content=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]
    assert client.get("/healthz/live").status_code == 200


def test_a_corrupt_file_in_the_folder_is_listed_with_its_error(client, folder):
    broken = folder / "VAE" / "broken.safetensors"
    broken.write_bytes(EMBEDDED.read_bytes()[:100_000])
    listed = {model["name"]: model for model in client.get("/models").json()["models"]}
    assert "broken" in listed
    assert listed["broken"]["error"]
    answer = client.post("/encode", content=PICTURE.read_bytes(), params={"model": "broken"})
    assert 400 <= answer.status_code < 500
    broken.unlink()
    assert "broken" not in names(client)
    assert round_trip(client, model="latentd-small")[1] > 22


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
def test_the_curl_lines_of_the_readme_do_what_they_say(client, folder, tmp_path):
    lines = re.findall("^curl .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shutil.copy(PICTURE, tmp_path / "picture.png")
    for half in TAEF2:  # of the test above
        (folder / "VAE" / half.name).unlink(missing_ok=True)
    write(folder / "VAE" / "my-vae.safetensors", state_of("sd1"))
    try:
        for line in lines:
            command = line.replace("localhost:8000", str(client.base_url).rstrip("/"))
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)
            assert (done.returncode, done.stderr) == (0, b""), line
    finally:
        (folder / "VAE" / "my-vae.safetensors").unlink()
    assert len(lines) == 4
    assert np.load(tmp_path / "latent.npy").shape == (1, 4, 64, 64)
    for kind in ("png", "jpg"):
        with Image.open(tmp_path / f"decoded.{kind}") as decoded:
            assert decoded.size == (512, 512)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
def test_an_error_does_not_become_a_latent(client, tmp_path):
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "latent.npy localhost" in line)
    (tmp_path / "picture.png").write_text("no picture")
    command = line.replace("localhost:8000", str(client.base_url).rstrip("/"))
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, b"415" in done.stderr) == (22, True)
    assert not (tmp_path / "latent.npy").exists()
