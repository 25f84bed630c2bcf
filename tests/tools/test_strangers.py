"""`latentd encode` and `decode` with services that break off, answer with anything, never end, or lie."""

import io
import json
import zipfile

import numpy as np
import pytest

from app.cli import main
from app.wire.arrays.npz import write_zip
from tests.service import latent, npy, picture, read_request, saying, told

NPY = "application/x-npy"
SHA = "ab" * 32
MOST = 1 << 20
"""Bytes of an answer, here."""
ROW = {
    "name": "m",
    "path": "m",
    "family": "sd1",
    "family_source": "operator",
    "format": "ldm",
    "sha256": SHA,
    "latent_channels": 4,
    "spatial_factor": 8,
    "error": None,
}
MODEL = told(200, "application/json", json.dumps(ROW).encode())


def good(media: str, content: bytes, **headers: str) -> bytes:
    return told(200, media, content, X_Model_SHA256=SHA, **headers)


def endless(peer) -> None:
    read_request(peer)
    peer.sendall(f"HTTP/1.1 200 x\r\nContent-Type: {NPY}\r\nX-Model-SHA256: {SHA}\r\n\r\n".encode())
    while True:
        peer.sendall(bytes(1 << 20))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture())
    return tmp_path / "in"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0\r\n",
        told(200, "text/html", b"<html>"),
        told(302, "text/html", Location="https://else.where/"),
        told(200, "application/json", b"{}"),
        told(200, "application/json", b"[" * 100_000),
        told(200, "application/json", b"\xff", Content_Encoding="gzip"),
        told(500, "application/problem+json", b"["),
    ],
)
@pytest.mark.parametrize("model", [[], ["--model", "m"]])
def test_who_does_not_tell_of_models_as_latentd_does_ends_it_in_one_line(folder, tmp_path, capsys, answer, model):
    with saying(answer) as url:
        assert main(["encode", str(folder), "-o", str(tmp_path / "out"), "--url", url, *model]) == 1
    err = capsys.readouterr().err
    assert err.startswith("latentd: ")
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.npy"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (good(NPY, npy(latent()))[:-1], "peer closed connection"),
        (good(NPY, npy(latent())[:-1]), "a.png: "),
        (good(NPY, b"<html>"), "a.png: "),
        (good(NPY, npy(latent(2, 4, 4, 4))), "expected one latent for a picture, got 2"),
        (good(NPY, npy(latent()).replace(b"(1, 4", b"(9, 4")), "a.png: "),
        (good(NPY, npy(latent() * np.float16(np.nan))), "a.png: "),
        (good(NPY, npy(latent()), Content_Encoding="gzip"), "in gzip"),
        (told(200, NPY, npy(latent())), "the model was replaced meanwhile"),
        (told(302, "text/html", Location="https://else.where/"), "HTTP 302 to https://else.where/"),
        (told(429, "application/problem+json", b"{}", Retry_After="0"), "HTTP 429"),
        (told(503, "text/html", b"", Retry_After="0"), "HTTP 503"),
        (told(413, "text/html", b""), "HTTP 413"),
        (endless, f"more than {MOST + 16 * 32 * 64} bytes"),
    ],
)
def test_what_is_no_latent_is_not_written(folder, tmp_path, capsys, monkeypatch, answer, words):
    monkeypatch.setattr("app.tools.run.ANSWER_BYTES", MOST)
    with saying(MODEL, answer) as url:
        assert main(["encode", str(folder), "-o", str(tmp_path / "out"), "--url", url, "--model", "m", "--flip"]) == 1
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.npy"))


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(2):
            archive.writestr(f"{index}.png", bytes(MOST))
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"PK", b"<html>", bomb(), write_zip([("0.png", b"")]).replace(b"PK\x01", b"PK\x02")]
)
def test_a_zip_that_is_none_fails_its_file_alone(tmp_path, capsys, monkeypatch, content):
    monkeypatch.setattr("app.tools.run.ANSWER_BYTES", MOST)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.npy").write_bytes(npy(latent(2, 4, 4, 4)))
    with saying(MODEL, good("application/zip", content)) as url:
        assert main(["decode", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--url", url, "--model", "m"]) == 1
    assert "a.npy: the archive" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))
