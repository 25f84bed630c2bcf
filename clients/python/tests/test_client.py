"""Both shells against a running service."""

import asyncio
import inspect
import io
import socket
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image

from latentd_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Decoded,
    Encoded,
    FamilyMismatch,
    InvalidParameter,
    NotAcceptable,
    Unauthorized,
    UnexpectedAnswer,
    UnknownModel,
    UnknownStream,
    Unreachable,
    UnsupportedMedia,
)
from latentd_client.steps import Policy
from tests.service import latent, listening, npy, occupied, picture, pixels

CALLS = ("encode", "decode", "preview", "show", "models", "model", "compare")


@pytest.fixture(scope="module")
def server(models):
    with listening(models) as (server, port):
        yield server, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def address(server):
    return server[1]


def test_a_picture_comes_back_in_its_own_size(do, address, tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(picture(45, 30))
    latents = do(address, "encode", path, model="kl", fit="resize")
    assert isinstance(latents, Encoded)
    assert (latents.array.shape, latents.array.dtype.name) == ((1, 4, 4, 6), "float16")
    assert (latents.model, latents.family, latents.convention) == ("kl", "sd1", "scaled")
    assert (latents.image_size, latents.image_fit, latents.image_offset) == ("45x30", "resize", None)
    assert (latents.plan, latents.reason, latents.posterior) == ("fp32/whole", None, None)
    assert "sd1 is a guess" in (latents.warning or "")
    assert set(latents.timing) == {"read", "queue", "load", "compute", "write"}
    assert len(latents.sha256) == 64
    assert latents.request_id
    back = do(address, "decode", latents)  # and nothing else
    assert isinstance(back, Decoded)
    assert (back.array.shape, back.array.dtype.name, back.model) == ((1, 30, 45, 3), "uint8", "kl")
    assert [each.size for each in back.pictures] == [(45, 30)]


def test_every_form_of_a_picture_is_the_same_picture(do, address):
    array = pixels()
    forms = [array, array[None], Image.fromarray(array), picture()]
    forms.append((array.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32))
    found = [do(address, "encode", form, model="kl", dtype="float32").array for form in forms]
    for each in found:
        np.testing.assert_allclose(each, found[0], rtol=1e-4, atol=1e-4)


def test_moments_and_floats(do, address):
    moments = do(address, "encode", pixels(), model="kl", posterior="moments", dtype="float32")
    assert (moments.array.shape, moments.posterior, moments.convention) == ((1, 8, 4, 4), "gaussian", "raw")
    drawn = do(address, "encode", pixels(), model="kl", posterior="sample", seed=1, latents="raw", dtype="float32")
    assert np.abs(drawn.array - moments.array[:, :4]).max() > 0
    floats = do(address, "decode", drawn, dtype="float32")
    assert floats.array.dtype == np.float32
    with pytest.raises(ValueError, match="black -1"):
        _ = floats.pictures


def test_files_are_written_in_the_type_of_their_names(do, address, tmp_path):
    for suffix in (".npy", ".npz", ".safetensors"):
        written = do(address, "encode", pixels(), model="kl", to=tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == written.content
        back = do(address, "decode", tmp_path / f"a{suffix}", model="kl", to=tmp_path / "a.png")
        assert back.array.shape == (1, 32, 32, 3)
    do(address, "decode", latent(2, 4, 4, 4), model="kl", to=tmp_path / "a.zip")
    do(address, "decode", latent(), model="kl", to=tmp_path / "a.jpg", quality=40)
    assert (tmp_path / "a.zip").read_bytes().startswith(b"PK")
    back.save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(NotAcceptable, match="zip"):
        do(address, "decode", latent(2, 4, 4, 4), model="kl", to=tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        do(address, "encode", pixels(), model="kl", to=tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_a_preview_is_a_picture_that_says_how_it_was_made(do, address, tmp_path):
    shown = do(address, "preview", latent(), model="kl", how="tiny", to=tmp_path / "a.png")
    assert (shown.array.shape, shown.media) == ((1, 32, 32, 3), "image/png")
    assert (shown.preview or "").startswith("tiny:tiny")
    latents = do(address, "encode", pixels(), model="kl")
    linear = do(address, "preview", latents, how="linear", client={"retries": 60})  # until its map is fitted
    assert (linear.array.shape, linear.media, linear.model) == ((1, 4, 4, 3), "image/webp", "kl")
    assert (linear.preview or "").startswith("linear;db=")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        do(address, "preview", latents, to="a.npy")


def test_whoever_looks_on_sees_the_steps(address):
    with Client(address) as client:
        with client.look_on("a") as pictures:
            for seed in range(3):
                assert client.show(latent(seed=seed), "a", model="kl", how="tiny", size="16x16") is None
                assert next(pictures).image_size == "16x16"
        with pytest.raises(UnknownStream, match="stream=b"):
            client.show(latent(), "b", model="kl")
        with pytest.raises(InvalidParameter), client.look_on("a b"):
            pass
    with pytest.raises(Unreachable), Client("http://127.0.0.1:1") as client, client.look_on("a"):
        pass


async def test_whoever_looks_on_sees_the_steps_on_an_event_loop(address):
    async with AsyncClient(address) as client:
        async with client.look_on("a") as pictures:
            assert await client.show(latent(), "a", model="kl", how="tiny") is None
            assert (await anext(pictures)).array.shape == (1, 32, 32, 3)
        with pytest.raises(UnknownStream):
            await client.show(latent(), "b", model="kl")
        with pytest.raises(InvalidParameter):
            async with client.look_on("a b"):
                pass
    async with AsyncClient("http://127.0.0.1:1") as client:
        with pytest.raises(Unreachable):
            async with client.look_on("a"):
                pass


def test_the_models(do, address):
    rows = {row.name: row for row in do(address, "models")}
    assert set(rows) == {"kl", "tiny"}
    assert (rows["kl"].family, rows["kl"].scaling_factor, rows["kl"].spatial_factor) == ("sd1", 0.18215, 8)
    assert do(address, "model", "kl") == rows["kl"]
    assert do(address, "model", str(rows["tiny"].sha256)[:12]) == rows["tiny"]
    with pytest.raises(UnknownModel, match="no such") as caught:
        do(address, "model", "no such/?#model")
    assert caught.value.status == 404


def test_a_comparison_has_numbers_and_a_sheet(do, address):
    found = do(address, "compare", picture(), models=["kl", "tiny"])
    assert [row.model for row in found.models] == ["kl", "tiny"]
    assert all(row.psnr_db is not None and row.error is None for row in found.models)
    assert found.image_size == "32x32"
    assert Image.open(io.BytesIO(found.sheet)).format == "PNG"
    assert len(do(address, "compare", pixels()).models) == 2
    with pytest.raises(UnknownModel, match="none"):
        do(address, "compare", pixels(), models=["kl", "none"])


def test_errors_are_the_service_s_own(do, address):
    with pytest.raises(UnsupportedMedia):
        do(address, "encode", b"no picture", model="kl")
    with pytest.raises(InvalidParameter, match="fit"):
        do(address, "encode", pixels(), model="kl", fit="stretch")
    latents = do(address, "encode", pixels(), model="tiny")
    with pytest.raises(FamilyMismatch, match="taesd"):  # the latents say whose they are
        do(address, "decode", latents, model="kl")
    with pytest.raises(FileNotFoundError):
        do(address, "encode", "nowhere.png")


def test_the_key(do, models):
    with listening(models, api_keys="let-me-in") as (_, port):
        url = f"http://127.0.0.1:{port}"
        assert len(do(url, "models", client={"api_key": "let-me-in"})) == 2
        with pytest.raises(Unauthorized):
            do(url, "models")


def test_a_deadline_is_kept_by_the_service_and_by_the_client(do, server):
    server, url = server
    with occupied(server.engine), pytest.raises(DeadlineExceeded):
        do(url, "decode", latent(), model="kl", timeout=0.3)

    with silent() as url:
        policy = Policy(timeout=0.1)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            do(url, "models", client={"policy": policy})
        assert time.monotonic() - began < 10


def test_nobody_there(do):
    with pytest.raises(Unreachable):
        do("http://127.0.0.1:1", "models", client={"retries": 0})
    with pytest.raises(Unreachable):
        do("ftp://127.0.0.1", "models")


def answering(*answers):
    """A transport that gives these in turn, and the requests that it saw."""
    left, seen = list(answers), []

    def handle(request):
        seen.append(request)
        return left.pop(0)

    return httpx.MockTransport(handle), seen


def test_it_waits_and_asks_again(do):
    problem = {"code": "overloaded", "detail": "full", "retryable": True, "request_id": "r"}
    busy = httpx.Response(429, headers={"Content-Type": "application/problem+json", "Retry-After": "0"}, json=problem)
    transport, seen = answering(busy, httpx.Response(200, json={"models": []}))
    assert do("http://host/below", "models", client={"transport": transport, "api_key": "k"}) == []
    assert [str(request.url) for request in seen] == ["http://host/below/models"] * 2
    assert seen[0].headers["authorization"] == "Bearer k"


def test_a_zip_that_is_none(do):
    transport, _ = answering(httpx.Response(200, headers={"Content-Type": "application/zip"}, content=b"PK"))
    with pytest.raises(UnexpectedAnswer, match="zip"):
        do("http://host", "compare", pixels(), client={"transport": transport})


@pytest.mark.parametrize("body", [{"data": []}, {"models": [{"id": "gpt"}]}, [], {"models": 3}])
def test_somebody_else_s_json(do, body):
    transport, _ = answering(httpx.Response(200, json=body))
    with pytest.raises(UnexpectedAnswer, match="not latentd's"):
        do("http://host", "models", client={"transport": transport})


def test_an_answer_that_cannot_be_unpacked(do):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, stream=httpx.ByteStream(b"no gzip")))
    with pytest.raises(UnexpectedAnswer, match="in gzip"):
        do("http://host", "models", client={"transport": transport})


def test_times_are_read_whoever_adds_to_them(do):
    headers = {
        "Content-Type": "application/x-npy",
        "Server-Timing": 'cdn;desc="HIT, far", edge; dur=1;desc=x, read;dur=2.5',
    }
    transport, _ = answering(httpx.Response(200, headers=headers, content=npy(latent())))
    assert do("http://host", "encode", pixels(), client={"transport": transport}).timing == {"edge": 1.0, "read": 2.5}


def test_columns_of_a_later_service_are_left_out(do):
    row = {"name": "a", "path": "a", "colour": "blue"}
    transport, _ = answering(httpx.Response(200, json={"models": [row]}))
    assert [each.name for each in do("http://host", "models", client={"transport": transport})] == ["a"]


def test_batches_come_in_order_and_tell_how_far_they_are(do, address):
    seen: list[tuple[int, int | None]] = []
    options = {"at_once": 3, "progress": lambda *far: seen.append(far)}
    items = [pixels(16 * (1 + index % 3), 16, seed=index) for index in range(11)]
    found = do(address, "encode_many", items, model="kl", client=options)
    assert [each.image_size for each in found] == [f"{item.shape[1]}x16" for item in items]
    assert seen == [(index + 1, 11) for index in range(11)]
    back = do(address, "decode_many", iter(found), client=options | {"progress": True})
    assert [each.array.shape[2] for each in back] == [item.shape[1] for item in items]
    assert do(address, "encode_many", []) == []


def test_how_far_it_is_is_told_before_a_result_is_handed_over(address):
    """Who zips a batch with its names never asks for more after the last."""
    seen: list[tuple[int, int | None]] = []
    items = [pixels(16, 16)] * 3
    with Client(address, progress=lambda *far: seen.append(far)) as client:
        assert len(list(zip("abc", client.encode_many(items, model="kl"), strict=False))) == 3

    async def awaited() -> None:
        async with (
            AsyncClient(address, progress=lambda *far: seen.append(far)) as client,
            aclosing(client.encode_many(items, model="kl")) as batch,
        ):
            for _ in items:
                await anext(batch)

    asyncio.run(awaited())
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_a_batch_ends_with_its_first_failure_and_begins_nothing_more(do, address):
    begun: list[int] = []

    def items():
        for index in range(100):
            begun.append(index)
            yield b"no picture" if index == 1 else pixels(16, 16)

    with pytest.raises(UnsupportedMedia):
        do(address, "encode_many", items(), model="kl", client={"at_once": 2})
    assert len(begun) <= 6


def test_a_batch_has_no_more_in_flight_than_it_may(do):
    """Counted where the requests arrive."""
    flying, most, lock = 0, 0, threading.Lock()

    def change(by: int) -> None:
        nonlocal flying, most
        with lock:
            flying += by
            most = max(most, flying)

    class Counting(httpx.MockTransport):
        def handle_request(self, request):
            change(1)
            time.sleep(0.02)
            change(-1)
            return super().handle_request(request)

        async def handle_async_request(self, request):
            change(1)
            await asyncio.sleep(0.02)
            change(-1)
            return super().handle_request(request)

    content = npy(latent())
    transport = Counting(lambda _: httpx.Response(200, headers={"Content-Type": "application/x-npy"}, content=content))
    found = do("http://host", "encode_many", [pixels()] * 12, client={"transport": transport, "at_once": 3})
    assert len(found) == 12
    assert most == 3


class silent:  # noqa: N801  used as a function
    """A listener that reads and never answers; `gone` is set when a client hangs up."""

    def __enter__(self) -> str:
        self.gone = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _serve(self) -> None:
        try:
            while True:
                peer, _ = self.listener.accept()
                with peer:
                    while peer.recv(1 << 16):
                        pass
                self.gone.set()
        except OSError:
            return

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # closing alone wakes nobody
        self.listener.close()
        self.thread.join(5)


async def test_a_task_that_is_cancelled_hangs_up():
    waiting = silent()
    with waiting as url:
        async with AsyncClient(url) as client:
            task = asyncio.create_task(client.encode(pixels()))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(waiting.gone.wait, 10)


async def test_a_batch_that_is_left_hangs_up():
    waiting = silent()
    with waiting as url:
        async with AsyncClient(url) as client:
            batch = client.encode_many([pixels()] * 8)
            async with aclosing(batch):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(batch), 0.3)
            assert await asyncio.to_thread(waiting.gone.wait, 10)


def test_the_shells_have_the_same_methods():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
    for name in CALLS:
        blocking, awaited = inspect.signature(getattr(Client, name)), inspect.signature(getattr(AsyncClient, name))
        assert blocking.parameters == awaited.parameters
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name))
        assert getattr(Client, name).__doc__
    assert replace(Policy(), retries=1).retries == 1
