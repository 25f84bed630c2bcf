import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from app.settings import Settings
from app.tools import run
from app.tools.errand import Errand
from app.tools.folders import send_files
from app.tools.manifest import Manifest
from app.tools.pictures import Wish
from app.tools.run import Stop
from app.wire.arrays.npz import write_zip
from tests.service import npy, picture

ROW = {"name": "kl", "path": "kl", "family": "sd1", "family_source": "config", "sha256": "ab" * 32, "spatial_factor": 8}
LATENT = npy(np.zeros((1, 4, 4, 4), np.float16))


@pytest.fixture
def service(monkeypatch):
    """A service whose answers to POST a test makes; counts them."""

    class Stub:
        def __init__(self) -> None:
            self.asked: list[httpx.Request] = []
            self.flying = self.most = 0
            self.row: dict[str, Any] = dict(ROW)

        async def answer(self, request: httpx.Request) -> httpx.Response:
            if request.method == "GET":
                listed = request.url.path == "/models"
                return httpx.Response(200, json={"models": [self.row], "default": "kl"} if listed else self.row)
            self.asked.append(request)
            self.flying += 1
            self.most = max(self.most, self.flying)
            await asyncio.sleep(0.01)
            self.flying -= 1
            return self.reply(request)

        def reply(self, request: httpx.Request) -> httpx.Response:
            return self.latent(request)

        def latent(self, request: httpx.Request, **headers: str) -> httpx.Response:
            told: dict[str, str] = {
                "content-type": request.headers["accept"],
                "x-model-sha256": self.row["sha256"],
                **headers,
            }
            return httpx.Response(200, content=LATENT, headers=told)

    stub, real = Stub(), httpx.AsyncClient
    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **options: real(transport=httpx.MockTransport(stub.answer), base_url="http://x")
    )
    return stub


def errand(op: str = "encode", existing: str = "refuse", settings: Settings | None = None, **query: object) -> Errand:
    return Errand(op, query, existing, "http://x", None, settings or Settings())  # type: ignore[arg-type]


def pictures(folder: Path, count: int, size: int = 32) -> str:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"{index:03}.png").write_bytes(picture(size, size))
    return str(folder)


def problem(status: int, code: str) -> httpx.Response:
    body = {"type": "t", "title": "t", "status": status, "detail": f"it is {code}", "instance": "/", "code": code}
    return httpx.Response(
        status,
        content=httpx.Response(200, json=body | {"request_id": "", "retryable": False}).content,
        headers={"content-type": "application/problem+json"},
    )


def test_so_many_are_in_flight_that_two_batches_fill(service, tmp_path):
    settings = Settings(batch_pixels=10 * 32 * 32)
    assert send_files(errand(settings=settings), [pictures(tmp_path / "in", 50)], str(tmp_path / "out")) == 0
    assert (len(service.asked), service.most) == (50, 20)


@pytest.mark.parametrize(("url", "begins"), [("http://x", b"\x89PNG"), (None, b"\x93NUMPY")])
def test_pixels_are_deflated_for_a_network_alone(service, tmp_path, url, begins):
    asked = replace(errand(settings=Settings(device="cpu")), url=url, wish=Wish(flip=True))
    assert send_files(asked, [pictures(tmp_path / "in", 1)], str(tmp_path / "out")) == 0
    assert [request.content[: len(begins)] for request in service.asked] == [begins] * 2


def test_a_picture_that_moves_is_told_of_where_it_is_decoded_here(service, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("a.webp", "b.webp", "c.avif"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    assert send_files(replace(errand(), wish=Wish(flip=True)), [str(folder)], str(tmp_path / "out")) == 0
    assert capsys.readouterr().err.count("warning: the picture has 2 frames: the first is encoded") == 1


def test_the_queue_and_the_memory_bound_what_is_in_flight(service, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 30)
    small = Settings(queue_size=5)
    assert send_files(errand(settings=small), [folder], str(tmp_path / "a")) == 0
    assert service.most == 5
    service.most = 0
    monkeypatch.setattr(run, "BYTES", 3 * len(picture()))
    assert send_files(errand(), [folder], str(tmp_path / "b")) == 0
    assert service.most == 3


@pytest.mark.parametrize("code", ["forbidden", "unknown_model", "unsupported_checkpoint"])
def test_what_every_other_file_would_meet_ends_it(service, tmp_path, capsys, code):
    service.reply = lambda request: service.latent(request) if len(service.asked) < 10 else problem(403, code)
    with pytest.raises(Stop, match=f"it is {code}"):
        send_files(errand(settings=Settings(queue_size=2)), [pictures(tmp_path / "in", 50)], str(tmp_path / "out"))
    assert len(service.asked) < 15
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("done, 0 failed, 0 skipped")


def test_a_model_that_is_replaced_meanwhile_ends_it(service, tmp_path):
    service.reply = lambda request: service.latent(request, **{"x-model-sha256": "cd" * 32})
    with pytest.raises(Stop, match="began with sha256 ababababab, and cdcdcdcdcd answered"):
        send_files(errand(), [pictures(tmp_path / "in", 3)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_warning_is_said_once(service, tmp_path, capsys):
    service.reply = lambda request: service.latent(request, **{"x-warning": "50%25 odd"})
    assert send_files(errand(), [pictures(tmp_path / "in", 5)], str(tmp_path / "out")) == 0
    assert capsys.readouterr().err.splitlines() == ["latentd: warning: 50% odd", "latentd: 5 done, 0 failed, 0 skipped"]


def test_the_manifest_says_what_made_each_file(service, tmp_path):
    service.reply = lambda request: service.latent(request, **{"x-image-size": "31x30"})
    send_files(errand(latents="raw", model="kl"), [pictures(tmp_path / "in", 1)], str(tmp_path / "out"))
    made = Manifest(tmp_path / "out").made("000.npy")
    assert made is not None
    assert (made.size, made.maker.op, made.maker.sha256, made.maker.family) == ("31x30", "encode", "ab" * 32, "sd1")
    assert made.maker.options == {"latents": "raw"}


@pytest.mark.parametrize(
    ("source", "query", "expected"),
    [
        ("config", {}, {"latents": "scaled", "size": "31x30"}),
        ("default", {}, {"latents": "scaled", "size": "31x30"}),
        ("config", {"fit": "crop"}, {"latents": "scaled"}),
        ("config", {"latents": "raw"}, {"latents": "raw", "size": "31x30"}),
    ],
)
def test_decode_asks_as_encode_noted(service, tmp_path, source, query, expected):
    service.row["family_source"] = source
    service.reply = lambda request: service.latent(request, **{"x-image-size": "31x30"})
    send_files(errand(**query), [pictures(tmp_path / "in", 1)], str(tmp_path / "latents"))
    send_files(errand("decode"), [str(tmp_path / "latents")], str(tmp_path / "out"))
    request = service.asked[-1]
    assert dict(request.url.params) == expected
    assert request.headers.get("x-latents-family") == (None if source == "default" else "sd1")  # a guess is not told
    send_files(errand("decode", "replace", size="8x8"), [str(tmp_path / "latents")], str(tmp_path / "out"))
    assert service.asked[-1].url.params["size"] == "8x8"


def test_a_file_that_comes_meanwhile_is_not_replaced(service, tmp_path, capsys):
    def reply(request):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "000.npy").write_text("somebody's")
        return service.latent(request)

    service.reply = reply
    assert send_files(errand(), [pictures(tmp_path / "in", 1)], str(tmp_path / "out")) == 1
    assert (tmp_path / "out" / "000.npy").read_text() == "somebody's"
    assert "has come meanwhile" in capsys.readouterr().err


def test_stdin_is_read_once(service, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(picture())))
    assert send_files(errand(), ["-"], str(tmp_path / "a.npy")) == 0
    assert (tmp_path / "a.npy").read_bytes() == LATENT
    assert service.asked[0].content == picture()


def test_a_latent_that_is_not_finite_is_not_written(service, tmp_path, capsys):
    bad = np.zeros((1, 4, 4, 4), np.float16)
    bad[0, 1, 2, 3] = np.nan
    replies = iter((npy(bad), LATENT))

    def reply(request):
        answer = service.latent(request)
        return httpx.Response(200, content=next(replies), headers=answer.headers)

    service.reply = reply
    assert (
        send_files(errand(settings=Settings(queue_size=1)), [pictures(tmp_path / "in", 2)], str(tmp_path / "out")) == 1
    )
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["001.npy"]
    assert "000.png: " in capsys.readouterr().err


def test_what_an_ended_run_left_behind_is_made_anew(service, tmp_path, capsys):
    """A twin comes before its picture's latent: where it is alone, the run that made it was killed."""
    folder, out = pictures(tmp_path / "in", 1), tmp_path / "out"
    flip, again = (replace(errand(existing=each), wish=Wish(flip=True)) for each in ("refuse", "skip"))
    assert send_files(flip, [folder], str(out)) == 0
    (out / "000.npy").unlink()
    assert send_files(again, [folder], str(out)) == 0
    assert sorted(path.name for path in out.glob("*.npy")) == ["000-flipped.npy", "000.npy"]
    (out / "000.npy").unlink()
    (out / ".latentd-manifest.jsonl").unlink()  # now nobody knows whose the twin is
    assert send_files(again, [folder], str(out)) == 1
    assert "has come meanwhile" in capsys.readouterr().err


def test_a_file_is_noted_before_it_is_there(service, tmp_path, monkeypatch):
    def killed(target, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        send_files(errand(), [pictures(tmp_path / "in", 1)], str(tmp_path / "out"))
    assert Manifest(tmp_path / "out").made("000.npy") is not None
    assert not (tmp_path / "out" / "000.npy").exists()


def test_files_of_other_programs_are_sent_with_as_many_pictures_as_they_hold(service, tmp_path):
    values = torch.zeros(1, 4, 4, 4)
    folder = tmp_path / "latents"
    folder.mkdir()
    torch.save([values, values], folder / "a.pt")
    safetensors.torch.save_file({"latent_tensor": values}, folder / "b.latent")
    service.reply = lambda request: service.latent(request) if "zip" not in request.headers["accept"] else zipped(2)

    told = {"content-type": "application/zip", "x-model-sha256": service.row["sha256"]}

    def zipped(count: int) -> httpx.Response:
        content = write_zip([(f"{index}.png", b"png") for index in range(count)])
        return httpx.Response(200, content=content, headers=told)

    assert send_files(errand("decode"), [str(folder)], str(tmp_path / "out")) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["a-0000.png", "a-0001.png", "b.png"]
