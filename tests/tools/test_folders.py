import asyncio
from pathlib import Path

import httpx
import pytest

from app.errors import InvalidInput, ServiceError
from app.settings import Settings
from app.tools.folders import AGAIN, LATENTS, PICTURES, connect, content_of, post, replace_file, send_files, walk


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_folders_are_walked_and_keep_their_layout(tmp_path):
    folder = touched(tmp_path, "b.PNG", "a/c.jpg", "a/d.jpeg", "a/deep/e.webp", "a/notes.txt", ".c.npy.part")
    found = walk([folder], PICTURES, ".npy")
    assert [str(target) for _, target in found] == ["a/c.npy", "a/d.npy", "a/deep/e.npy", "b.npy"]
    assert all(source.is_file() for source, _ in found)


def test_a_file_is_taken_whatever_it_is_called(tmp_path):
    assert walk([tmp_path / "x.y.bmp"], PICTURES, ".npy") == [(tmp_path / "x.y.bmp", Path("x.y.npy"))]


def test_latents_are_npy_npz_and_safetensors(tmp_path):
    folder = touched(tmp_path, "a.npy", "b.safetensors", "c.npz", "d.png")
    assert [target.name for _, target in walk([folder], LATENTS, ".png")] == ["a.png", "b.png", "c.png"]


def test_two_inputs_for_one_output_are_refused(tmp_path):
    folder = touched(tmp_path, "a.png", "a.jpg")
    with pytest.raises(InvalidInput, match=r"a\.npy"):
        walk([folder], PICTURES, ".npy")
    with pytest.raises(InvalidInput, match=r"a\.npy"):
        walk([Path("x/a.png"), Path("y/a.png")], PICTURES, ".npy")


def test_a_folder_without_files_is_an_error(tmp_path):
    with pytest.raises(InvalidInput, match=r"\.jpeg, \.jpg, \.png, \.webp"):
        walk([tmp_path], PICTURES, ".npy")


def test_nothing_left_to_do_needs_no_service(tmp_path, monkeypatch):
    monkeypatch.setattr("app.tools.folders.create_app", None)
    touched(tmp_path, "in/a.png", "out/a.npy")
    inputs, output = [tmp_path / "in"], tmp_path / "out"
    assert send_files("encode", inputs, output, {}, Settings(), url=None, key=None, resume=True) == 0


@pytest.mark.parametrize(
    ("header", "waited"), [("2", 2.0), ("0", 0.0), ("3600", 60.0), (None, 1.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 1.0)]
)
@pytest.mark.parametrize("full", [0, 2, AGAIN, AGAIN + 1, 100])
async def test_a_full_queue_is_asked_again_when_it_says_and_not_for_ever(monkeypatch, header, waited, full):
    waits: list[float] = []
    bodies: list[bytes] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        if len(bodies) <= full:
            return httpx.Response(429, headers={"Retry-After": header} if header else {})
        return httpx.Response(200)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        response = await post(client, "/decode", content=b"body")
    times = min(full, AGAIN)
    assert response.status_code == (200 if full <= AGAIN else 429)
    assert bodies == [b"body"] * (times + 1)
    assert waits == [waited] * times


async def test_other_answers_are_not_asked_for_again():
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(503, headers={"Retry-After": "1"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        assert (await post(client, "/decode")).status_code == 503
    assert len(asked) == 1


def test_a_file_that_cannot_be_put_in_its_place_leaves_nothing(tmp_path):
    (tmp_path / "a.npy").mkdir()
    with pytest.raises(OSError, match=r"'[^']*/a\.npy'$"):
        replace_file(tmp_path / "a.npy", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_full_disk_leaves_nothing(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"/a\.npy'$"):
            replace_file(tmp_path / "a.npy", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


async def test_a_key_is_sent_in_the_bytes_that_the_service_compares():
    async with connect("http://127.0.0.1:1", "schlüssel", Settings()) as client:
        assert client.headers.raw[-1] == (b"Authorization", "Bearer schlüssel".encode())


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"detail": 1}'])
def test_a_problem_that_cannot_be_read_is_a_reason_too(content):
    response = httpx.Response(500, content=content, headers={"content-type": "application/problem+json"})
    with pytest.raises(ServiceError, match="HTTP 500"):
        content_of(response, "image/png")
