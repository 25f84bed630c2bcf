import time

import httpx
import pytest

from app.api.door.bounds import PIECE, PROBES, Bounds
from app.api.door.room import Room
from tests.service import picture, refused, serving


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl", api_keys="first") as service:
        yield service


async def test_more_parameters_than_there_are_are_not_looked_at(service):
    headers = {"Authorization": "Bearer first"}
    at = time.perf_counter()
    for query in ("&".join(f"a{index}" for index in range(10_000)), "a=" + "b" * 60_000, "&" * 60_000):
        answer = await service.get(f"/models?{query}", headers=headers)
        assert "at most 64 in 32768 are read" in refused(answer, 422, "invalid_parameter")
        assert len(answer.content) < 1000
    twice = "&".join(f"a{index % 32}={index}" for index in range(64))
    assert "more than once" in refused(await service.get(f"/models?{twice}", headers=headers), 422, "invalid_parameter")
    assert time.perf_counter() - at < 5
    for path in PROBES:
        assert (await service.get(f"{path}?{'&' * 1000}")).status_code == 200


async def test_head_is_get_without_a_body(service):
    headers = {"Authorization": "Bearer first", "X-Request-Id": "a"}
    for path in ("/models", "/models/kl", "/models/kl/plan", "/healthz/ready", "/openapi.json", "/docs", "/nothing"):
        asked, got = [await service.request(method, path, headers=headers) for method in ("HEAD", "GET")]
        assert asked.content == b""
        assert (asked.status_code, asked.headers) == (got.status_code, got.headers)
    answer = await service.request("HEAD", "/encode", headers=headers)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


async def test_a_body_of_two_lengths_is_refused(service):
    headers = {"Authorization": "Bearer first", "Transfer-Encoding": "chunked", "Content-Length": "5"}
    answer = await service.post("/encode", content=picture(), headers=headers)
    assert "not both" in refused(answer, 400, "malformed_body")
    assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
async def test_an_answer_leaves_in_pieces_and_is_counted_until_it_has_left(size):
    room, pieces, content = Room(10), [], bytes(index % 251 for index in range(size))

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    async def watched(scope, receive, send):
        async def note(message):
            if message["type"] == "http.response.body":
                pieces.append((len(message["body"]), message.get("more_body", False)))
                assert room.used == size
            await send(message)

        await Bounds(answer, room)({**scope, "state": {}}, receive, note)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(watched), base_url="http://service") as client:
        assert (await client.get("/")).content == content
    assert max(length for length, _ in pieces) <= PIECE
    assert [more for _, more in pieces] == [True] * (len(pieces) - 1) + [False]
    assert room.used == 0


async def test_what_has_left_of_an_answer_without_an_end_is_not_counted_any_more():
    room, used = Room(10), []

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": bytes(7), "more_body": True})
            used.append(room.used)
        await send({"type": "http.response.body", "body": b""})

    async def served(scope, receive, send):
        await Bounds(answer, room)({**scope, "state": {}}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://service") as client:
        assert len((await client.get("/")).content) == 21
    assert used == [0, 0, 0]
