import errno
from types import SimpleNamespace

import httpx
import pytest

from app.errors import InvalidInput, ServiceError
from app.settings import Settings
from app.tools.service import (
    AGAIN,
    Refused,
    connect,
    content_of,
    list_models,
    model_of,
    post,
    replace_file,
    systemic,
)
from tests.store.weights import state_of, write


@pytest.mark.parametrize(
    ("header", "waited"), [("2", 2.0), ("0", 0.0), ("3600", 60.0), (None, 1.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 1.0)]
)
@pytest.mark.parametrize("full", [0, 2, AGAIN, AGAIN + 1, 100])
@pytest.mark.parametrize("status", [429, 503])
async def test_what_has_no_room_is_asked_again_when_it_says_and_not_for_ever(monkeypatch, header, waited, full, status):
    waits: list[float] = []
    bodies: list[bytes] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        if len(bodies) <= full:
            return httpx.Response(status, headers={"Retry-After": header} if header else {})
        return httpx.Response(200)

    monkeypatch.setattr("app.tools.service.asyncio", SimpleNamespace(sleep=sleep))
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        response = await post(client, "/decode", content=b"body")
    times = min(full, AGAIN)
    assert response.status_code == (200 if full <= AGAIN else status)
    assert bodies == [b"body"] * (times + 1)
    assert waits == [waited] * times


async def test_other_answers_are_not_asked_for_again():
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500, headers={"Retry-After": "1"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        assert (await post(client, "/decode")).status_code == 500
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


def test_the_reason_comes_with_its_code():
    problem = {"type": "t", "title": "t", "status": 404, "detail": "no model", "instance": "/", "code": "unknown_model"}
    content = httpx.Response(404, json=problem | {"request_id": "", "retryable": False}).content
    response = httpx.Response(404, content=content, headers={"content-type": "application/problem+json"})
    with pytest.raises(Refused, match="no model") as raised:
        content_of(response, "image/png")
    assert raised.value.code == "unknown_model"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Refused("", "unauthorized"), True),
        (Refused("", "forbidden"), True),
        (Refused("", "unknown_model"), True),
        (Refused("", "unsupported_media"), False),
        (Refused("", "overloaded"), False),
        (ServiceError(""), False),
        (httpx.ConnectError(""), True),
        (httpx.ReadError(""), False),
        (OSError(errno.ENOSPC, ""), True),
        (FileNotFoundError(errno.ENOENT, ""), False),
    ],
)
def test_what_every_file_would_meet(error, expected):
    assert systemic(error) is expected


async def test_the_model_that_is_meant_is_known_before_anything_is_sent(tmp_path):
    write(tmp_path / "VAE" / "a.safetensors", state_of("taesd"))
    (tmp_path / "VAE" / "broken.pt").write_text("no")
    settings = Settings(models=tmp_path, device="cpu")
    async with connect(None, None, settings) as client:
        assert (await model_of(client, None)).name == "a"
        assert (await model_of(client, "a")).family == "taesd"
        with pytest.raises(Refused, match="nobody"):
            await model_of(client, "nobody")
        with pytest.raises(Refused, match="model broken: "):
            await model_of(client, "broken")
        write(tmp_path / "VAE" / "b.safetensors", state_of("taesd", 1))
        with pytest.raises(InvalidInput, match=r"--model is required: there are a, b$"):
            await model_of(client, None)


async def test_an_empty_folder_has_no_model(tmp_path):
    async with connect(None, None, Settings(models=tmp_path, device="cpu")) as client:
        with pytest.raises(InvalidInput, match="no usable model"):
            await model_of(client, None)


def test_models_of_no_service_are_an_error():
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1"):
        list_models("http://127.0.0.1:1", None, Settings())
