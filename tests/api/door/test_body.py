import asyncio

import pytest

from app.api.door import body
from tests.service import SIDE, array_of, latent, npy, occupied, picture, picture_of, refused, serving, until


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl", max_body_bytes=100_000) as service:
        yield service


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


async def chunks(total: int, first: bytes = b""):
    yield first
    for _ in range(total // 1000):
        yield bytes(1000)


@pytest.mark.parametrize("path", ["/encode", "/decode"])
async def test_a_body_over_the_limit_is_refused_announced_or_not(service, path):
    before = service.count("vae_rejected_total", reason="too_large")
    announced = await service.post(path, content=bytes(100_001))
    assert "100001 bytes" in refused(announced, 413, "too_large")
    chunked = await service.post(path, content=chunks(200_000))
    assert "more than 100000 bytes" in refused(chunked, 413, "too_large")
    lied = await service.post(path, content=chunks(200_000), headers={"Content-Length": "10"})
    refused(lied, 413, "too_large")
    huge = await service.post(path, content=b"", headers={"Content-Length": "9" * 5000})
    refused(huge, 413, "too_large")
    assert service.count("vae_rejected_total", reason="too_large") == before + 4


async def test_a_form_over_the_limit_is_refused(service):
    for part in (PART, PART.replace(b'; filename="a"', b"")):
        answer = await service.post("/encode", content=chunks(200_000, part), headers=FORM)
        refused(answer, 413, "too_large")


async def test_a_body_in_chunks_is_a_body(service):
    async def slices():
        content = picture()
        for start in range(0, len(content), 7):
            yield content[start : start + 7]

    assert (await service.post("/encode", content=slices())).content == (
        await service.post("/encode", content=picture())
    ).content


async def test_a_body_that_does_not_come_is_given_up(service, monkeypatch):
    monkeypatch.setattr(body, "BODY_SECONDS", 0.05)

    async def never(start):
        yield start
        await asyncio.Event().wait()

    for start, headers in ((picture()[:9], {}), (PART, FORM)):
        answer = await service.post("/encode", content=never(start), headers=headers)
        assert "0.05 s" in refused(answer, 408, "slow_body")
        assert answer.json()["retryable"] is True


async def test_pixels_over_the_limit_are_refused_before_any_is_decoded(models, monkeypatch):
    monkeypatch.setattr("app.api.routes.read_pixels", None)
    monkeypatch.setattr("app.api.routes.read_latents", None)
    async with serving(models, default_model="kl", max_pixels=SIDE * SIDE - 1) as service:
        assert "1024 pixels" in refused(await service.post("/encode", content=picture()), 413, "too_large")
        assert "1024 pixels" in refused(await service.post("/decode", content=npy(latent())), 413, "too_large")


async def test_more_than_the_queue_can_ever_hold_is_too_large_not_too_early(models):
    async with serving(models, default_model="kl", queue_size=2) as service:
        answer = await service.post("/decode", content=npy(latent(3, 4, 4, 4)))
        assert "3 pictures" in refused(answer, 413, "too_large")
    one = SIDE * SIDE
    async with serving(models, default_model="kl", queue_pixels=2 * one, max_pixels=one) as service:
        answer = await service.post("/decode", content=npy(latent(3, 4, 4, 4)))
        assert f"{3 * one} pixels in one request" in refused(answer, 413, "too_large")
        assert (await service.post("/decode", content=npy(latent(2, 4, 4, 4)))).status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"--b--\r\n", FORM, 422, "invalid_parameter"),
        (b"", FORM, 400, "malformed_body"),
        (b"not a form", FORM, 400, "malformed_body"),
        (PART + b"x\r\n--b--\r\n", {"Content-Type": "multipart/form-data"}, 400, "malformed_body"),
        (PART.replace(b"image", b"picture") + b"x\r\n--b--\r\n", FORM, 422, "invalid_parameter"),
        (b"--b\r\nContent-Type: a/b\r\n\r\nx\r\n--b--\r\n", FORM, 400, "malformed_body"),
        ((PART + b"x\r\n") * 300 + b"--b--\r\n", FORM, 400, "malformed_body"),
        (PART.replace(b'; filename="a"', b"") + b"x\r\n--b--\r\n", FORM, 415, "unsupported_media"),
        (PART + picture(), FORM, 400, "malformed_body"),  # ends before its boundary
        (PART + picture() + b"\r\n--b\r\n", FORM, 400, "malformed_body"),
        (
            b'--b\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\nx\r\n--b--\r\n',
            FORM,
            422,
            "invalid_parameter",
        ),
    ],
)
async def test_forms_that_are_none(service, content, headers, status, code):
    answer = await service.post("/encode", content=content, headers=headers)
    refused(answer, status, code)


async def test_parts_stay_in_memory(service, monkeypatch):
    def spool(*_, **__):
        raise OSError("a read-only container")

    for name in ("SpooledTemporaryFile.__init__", "TemporaryFile", "NamedTemporaryFile"):
        monkeypatch.setattr(f"tempfile.{name}", spool)
    array_of(await service.post("/encode", files=[("image", ("a.png", picture()))]))


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5", "", "²", "1e3", "9" * 5000, "86400001"])
async def test_a_deadline_is_a_number_of_milliseconds(service, given):
    headers = {"X-Request-Timeout-Ms": given.encode("latin-1")}
    answer = await service.post("/encode", content=picture(), headers=headers)
    assert "X-Request-Timeout-Ms" in refused(answer, 422, "invalid_parameter")


async def test_a_deadline_that_can_be_met_is(service):
    answer = await service.post("/decode", content=npy(latent()), headers={"X-Request-Timeout-Ms": "86400000"})
    picture_of(answer)


async def test_a_deadline_that_passes_is_a_504(models):
    async with serving(models, default_model="kl") as service:
        with occupied(service.engine):
            headers = {"X-Request-Timeout-Ms": "1000"}
            request = asyncio.ensure_future(service.post("/encode", content=picture(), headers=headers))
            await asyncio.sleep(1.2)
        answer = await request
        assert "deadline" in refused(answer, 504, "deadline_exceeded")
        assert answer.json()["retryable"] is True


async def test_a_deadline_that_cannot_be_met_is_a_429_with_the_wait(models):
    async with serving(models, default_model="kl") as service:
        digest = (await service.get("/models/kl")).json()["sha256"]
        for _ in range(3):
            service.engine.workers[0].rate.note(digest, "encode", SIDE * SIDE, 100.0)  # seconds a picture
        headers = {"X-Request-Timeout-Ms": "2000"}
        with occupied(service.engine):
            waiting = [asyncio.ensure_future(service.post("/encode", content=picture())) for _ in range(4)]
            await until(lambda: service.engine.workers[0].batcher.wait_seconds() > 50)
            answer = await service.post("/encode", content=picture(), headers=headers)
            assert "s of work" in refused(answer, 429, "overloaded")
            assert int(answer.headers["Retry-After"]) >= 5
        assert {(await task).status_code for task in waiting} == {200}
        # An idle device refuses nothing for a deadline: only what runs can show how long it takes.
        await until(lambda: service.engine.workers[0].batcher.wait_seconds() == 0)
        assert (await service.post("/encode", content=picture(), headers=headers)).status_code == 200


async def test_a_full_queue_is_a_429_with_the_wait(models):
    async with serving(models, default_model="kl", queue_size=2) as service:
        with occupied(service.engine):
            waiting = [asyncio.ensure_future(service.post("/encode", content=picture())) for _ in range(12)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                if task.done():
                    answer = task.result()
                    assert "queue is full" in refused(answer, 429, "overloaded")
                    assert int(answer.headers["Retry-After"]) >= 1
        statuses = [(await task).status_code for task in waiting]
        assert set(statuses) == {200, 429}
        assert service.count("vae_rejected_total", reason="queue_full") == statuses.count(429)


async def test_bodies_over_the_room_of_all_are_refused_before_they_are_read(models):
    body = npy(latent())
    async with serving(models, default_model="kl", buffer_bytes=3 * len(body)) as service:
        room = service.app.state.context.room
        gate, read = asyncio.Event(), asyncio.Event()

        async def held():
            yield body[:50]
            await gate.wait()
            yield body[50:]

        async def unread():
            read.set()
            yield body

        length = {"Content-Length": str(len(body))}
        waiting = [asyncio.ensure_future(service.post("/decode", content=held(), headers=length)) for _ in range(3)]
        await until(lambda: room.used == 3 * len(body))
        for headers in (length, {}):  # announced, and as it comes
            answer = await service.post("/decode", content=body if not headers else unread(), headers=headers)
            assert "too many bytes in flight" in refused(answer, 503, "too_many_bytes")
            assert (answer.headers["Retry-After"], answer.json()["retryable"]) == ("1", True)
        assert not read.is_set()
        assert service.count("vae_rejected_total", reason="too_many_bytes") == 2
        gate.set()
        assert [(await answer).status_code for answer in waiting] == [200] * 3
        await until(lambda: room.used == 0)
        assert (await service.post("/decode", content=body)).status_code == 200


async def test_what_is_refused_leaves_nothing_in_the_room(service):
    room = service.app.state.context.room
    for content in (bytes(100_001), bytes(5000), chunks(200_000), picture()):
        await service.post("/encode", content=content)
    await until(lambda: room.used == 0)


async def test_a_body_that_stops_is_given_up_early(service, monkeypatch):
    monkeypatch.setattr(body, "SILENT_SECONDS", 0.05)

    async def stops():
        yield picture()[:9]
        await asyncio.Event().wait()

    refused(await service.post("/encode", content=stops(), headers={"Content-Length": "50000"}), 408, "slow_body")
    assert service.app.state.context.room.used == 0


async def test_a_full_queue_is_told_before_the_body_is_read(models):
    async with serving(models, default_model="kl", queue_size=1) as service:
        batcher = service.engine.workers[0].batcher
        ticket = batcher.admit(1, 1, None, 0.0)
        read = asyncio.Event()

        async def unread():
            read.set()
            yield picture()

        for path in ("/encode", "/decode", "/compare?models=kl"):
            answer = await service.post(path, content=unread())
            assert "queue is full" in refused(answer, 429, "overloaded")
        assert not read.is_set()
        batcher.give_back(ticket)
        assert (await service.post("/encode", content=picture())).status_code == 200
