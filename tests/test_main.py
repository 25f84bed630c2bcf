import asyncio
import errno
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from app.api.door.connection import Connection
from app.api.streams import Streams
from app.engine.memory import host_memory
from app.logs import JsonFormatter, TextFormatter
from app.main import build_engine, create_app
from app.server import Listening, Server, server_of
from app.settings import InvalidSetting, Settings
from app.store.digests import digest_of
from tests.fakes import total
from tests.service import SIDE, latent, listening, npy, occupied, picture, refused, serving, until


@pytest.fixture(scope="module")
def server(models):
    with listening(models, default_model="kl", max_body_bytes=1_000_000) as (server, port):
        yield server.engine, port


@pytest.fixture
def talk(server):
    """Sends bytes over one connection and returns the answers: (status, headers, body) each."""
    with socket.create_connection(("127.0.0.1", server[1]), timeout=60) as connection:
        incoming = connection.makefile("rb")

        def talk(*requests: bytes) -> list[tuple[int, dict[str, str], bytes]]:
            answers = []
            for request in requests:
                connection.sendall(request)
                answers.append(read_answer(incoming))
            return answers

        yield talk
        incoming.close()


def read_answer(incoming) -> tuple[int, dict[str, str], bytes]:
    while True:
        status = int(incoming.readline().split()[1])
        headers = {}
        while line := incoming.readline().strip():
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        if status != 100:
            return status, headers, incoming.read(int(headers.get("content-length", 0)))


def post(path: str, body: bytes = b"", *headers: str, length: int | None = None, version: str = "1.1") -> bytes:
    announced = len(body) if length is None else length
    head = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {announced}", *headers]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


GET = b"GET /healthz/live HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_connection_serves_on_after_a_request(talk):
    answers = talk(post("/encode", picture()), GET, post("/encode", picture()))
    assert [status for status, _, _ in answers] == [200, 200, 200]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/encode", bytes(1_000_001)), 413),  # refused before its body is read
        (post("/encode?model=nobody", picture()), 404),
        (post("/nothing", bytes(300_000)), 404),
        (post("/encode?x=1", bytes(300_000)), 422),
        (post("/encode", b"no picture"), 415),
    ],
)
def test_a_connection_serves_on_after_an_error_whose_body_was_still_coming(talk, request_, status):
    answers = talk(request_, GET, request_, GET)
    assert [answer[0] for answer in answers] == [status, 200, status, 200]
    assert json.loads(answers[0][2])["status"] == status


def test_a_chunked_body_over_the_limit_is_refused(talk):
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    head = b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    (first, _, _), (second, _, _) = talk(head + chunk * 17 + b"0\r\n\r\n", GET)
    assert (first, second) == (413, 200)


def test_a_huge_announcement_is_refused_without_waiting_for_it(server):
    with socket.create_connection(("127.0.0.1", server[1]), timeout=60) as connection:
        connection.sendall(post("/encode", b"", "Expect: 100-continue", length=10**17))
        with connection.makefile("rb") as incoming:
            assert incoming.readline().split()[1] == b"413"  # and no 100 before it


def test_http_1_0_is_answered_and_closed(server):
    with socket.create_connection(("127.0.0.1", server[1]), timeout=60) as connection:
        connection.sendall(post("/encode", picture(), version="1.0"))
        with connection.makefile("rb") as incoming:
            status, headers, _ = read_answer(incoming)
            assert status == 200
            assert headers["x-model"] == "kl"
            assert incoming.read() == b""


@pytest.mark.parametrize(
    "request_",
    [
        b"garbage\r\n\r\n",
        post("/encode", b"", "Content-Length: 5"),
        post("/encode").replace(b"Content-Length: 0", b"Content-Length: -1"),
        post("/encode").replace(b"Content-Length: 0", b"Content-Length: \xb2"),
    ],
)
def test_what_is_no_http_is_refused_and_the_service_goes_on(server, request_):
    _, port = server
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request_)
        assert b" 400 " in connection.recv(4096).splitlines()[0]
    assert httpx.get(f"http://127.0.0.1:{port}/healthz/live").status_code == 200


@pytest.mark.parametrize("path", ["/encode?model=%ff%fe", "/encode?%ff=1", "/models/%ff", "/%00", "/encode?model=%zz"])
def test_what_is_no_utf8_is_an_honest_error(talk, path):
    ((status, headers, body),) = talk(post(path, picture()))
    assert status in (404, 405, 422)
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["status"] == status


def test_a_client_that_leaves_is_not_computed_for(server):
    engine, port = server
    worker = engine.workers[0]

    def value(name: str, **labels: str) -> float:
        return total(engine.metrics.registry, name, **labels)

    def waits_until(true) -> None:
        asyncio.run(until(true))

    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        assert client.post("/encode", content=picture()).status_code == 200
        items = value("vae_batch_items_total")
        with occupied(engine):
            # One on the device and one staged behind it; what comes then stays in the queue.
            busy = [pool.submit(client.post, "/encode", content=picture(side, SIDE)) for side in (32, 32)]
            waits_until(lambda: engine.open_requests == 2)
            assert not any(answer.done() for answer in busy)
            with closing(socket.create_connection(("127.0.0.1", port))) as leaving:
                leaving.sendall(post("/encode", picture(64, 32)))
                waits_until(lambda: engine.open_requests == 3)
            waits_until(lambda: engine.open_requests == 2)
        assert [answer.result().status_code for answer in busy] == [200, 200]
        waits_until(lambda: worker.batcher.items == 0)
        assert client.post("/encode", content=picture()).status_code == 200
    assert value("vae_batch_items_total") == items + 3  # the two, and the one after
    assert value("vae_cancelled_total", stage="request") >= 1
    assert value("vae_requests_total", op="encode", model="kl", status="499") == 1


def test_a_client_that_leaves_within_its_body_is_noticed(server):
    engine, port = server

    def gone() -> float:
        return engine.metrics.registry.get_sample_value("vae_cancelled_total", {"stage": "request"}) or 0.0

    before = gone()
    with closing(socket.create_connection(("127.0.0.1", port))) as leaving:
        leaving.sendall(post("/encode", picture()[:50], length=1000))
    asyncio.run(until(lambda: gone() == before + 1))


def test_sigterm_finishes_what_was_accepted(models):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "serve", "--models", str(models), "--default-model", "kl"]
    command += ["--device", "cpu", "--port", str(port), "--log-format", "json", "--drain-seconds", "300"]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        try:
            while True:
                assert process.poll() is None
                try:
                    if client.get("/healthz/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            body = npy(latent(1, 4, 32, 32))  # 256 pixels a side: long enough to be in flight
            assert client.post("/decode", content=body).status_code == 200  # loaded and forecast
            answers = [pool.submit(client.post, "/decode", content=body) for _ in range(6)]
            while "vae_requests_in_flight 6.0" not in client.get("/metrics").text:
                assert not all(answer.done() for answer in answers)
            process.send_signal(signal.SIGTERM)
            assert [answer.result().status_code for answer in answers] == [200] * 6
            log = process.stderr.read() if process.stderr else ""
            assert process.wait(60) == 0
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.splitlines()]
    assert sum(line.get("path") == "/decode" and line["status"] == 200 for line in lines) == 7
    assert not any("error" in line for line in lines)


def test_what_does_not_end_in_time_is_told_to_come_back(models):
    with listening(models, default_model="kl", drain_seconds=0.2) as (server, port), ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{port}/encode"
        assert httpx.post(url, content=picture(), timeout=60).status_code == 200  # started
        with occupied(server.engine):
            waiting = pool.submit(httpx.post, url, content=picture(), timeout=60)
            asyncio.run(until(lambda: server.engine.open_requests == 1))
            server.handle_exit(signal.SIGTERM, None)
            answer = waiting.result()
        assert "shutting down" in refused(answer, 503, "unavailable")
        assert answer.headers["Retry-After"]


def test_a_second_interrupt_answers_what_is_in_flight_with_a_503_and_no_traceback(models, caplog):
    with listening(models, default_model="kl", drain_seconds=60) as (server, port), ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{port}/encode"
        assert httpx.post(url, content=picture(), timeout=60).status_code == 200  # started
        with occupied(server.engine):
            waiting = [pool.submit(httpx.post, url, content=picture(), timeout=60) for _ in range(8)]
            asyncio.run(until(lambda: server.engine.open_requests == 8))
            server.handle_exit(signal.SIGINT, None)
            server.handle_exit(signal.SIGINT, None)
            answers = [answer.result() for answer in waiting]
    for answer in answers:
        assert "shutting down" in refused(answer, 503, "unavailable")
    assert not any(record.exc_info for record in caplog.records)


def test_a_large_folder_is_read_while_the_service_serves(models, tmp_path, monkeypatch):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "VAE" / "kl.safetensors").rename(tmp_path / "VAE" / "unread.safetensors")
    gate = threading.Event()

    def hold(files, check):
        while files[0].path.stem == "unread" and not gate.wait(0.02):
            check()
        return digest_of(files, check)

    monkeypatch.setattr("app.store.store.digest_of", hold)
    monkeypatch.setattr("app.store.follow.FIRST_SECONDS", 0.3)
    monkeypatch.setattr("app.store.follow.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("app.engine.engine.FIRST_SECONDS", 0.3)
    with listening(tmp_path) as (server, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def statuses() -> list[int]:
            return [client.get(f"/healthz/{name}").status_code for name in ("live", "ready", "startup")]

        assert statuses() == [200, 503, 503]
        answer = client.post("/encode?model=unread", content=picture())
        assert "still being read" in refused(answer, 503, "unavailable")
        assert answer.json()["retryable"]
        assert client.post("/encode?model=tiny", content=picture()).status_code == 200
        assert [row["name"] for row in client.get("/models").json()["models"]] == ["tiny"]
        gate.set()
        asyncio.run(until(lambda: server.engine.scanned))
        assert statuses() == [200, 200, 200]
        assert client.post("/encode?model=unread", content=picture()).status_code == 200


def test_a_signal_turns_readiness_red_and_a_third_interrupt_forces(models):
    app = create_app(Settings(models=models, device="cpu"))
    engine = app.state.context.engine
    server = Server(uvicorn.Config(app), engine, Streams(), 30)
    server.handle_exit(signal.SIGTERM, None)
    assert (engine.draining, server.should_exit, server.force_exit) == (True, True, False)
    server.handle_exit(signal.SIGTERM, None)
    assert not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
    assert server._captured_signals == []  # uvicorn would raise them again, for an exit status of 143


async def test_a_lost_device_ends_the_server(models):
    app = create_app(Settings(models=models, device="cpu"))
    engine = app.state.context.engine
    server = Server(uvicorn.Config(app), engine, Streams(), 30)
    assert await server.on_tick(1) is False
    engine.workers[0].thread.lost = "gone"
    assert await server.on_tick(2) is True


async def test_that_no_file_can_be_opened_is_logged_once_a_minute(models, caplog):
    app = create_app(Settings(models=models, device="cpu"))
    server = Server(uvicorn.Config(app), app.state.context.engine, Streams(), 30)
    loop = asyncio.get_running_loop()
    for _ in range(2048):  # as asyncio says it for each of its attempts to accept
        server.note(loop, {"message": "socket.accept()", "exception": OSError(errno.EMFILE, "Too many open files")})
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert caplog.records[0].exc_info is None
    server.note(loop, {"message": "something else", "exception": OSError(errno.EIO, "an error")})
    assert len(caplog.records) == 2


def test_more_connections_than_files_are_no_storm(models):
    """With room for 1 connection and `SPARE` more, of which the silent give way; health answers all along."""
    with listening(models, max_connections=1) as (_, port), ExitStack() as silent:
        url = f"http://127.0.0.1:{port}/healthz/live"
        for _ in range(100):
            silent.enter_context(closing(socket.create_connection(("127.0.0.1", port), timeout=60)))
        at = time.perf_counter()
        assert httpx.get(url, timeout=60).status_code == 200
        assert time.perf_counter() - at < 10


@pytest.mark.parametrize(
    ("settings", "name"), [({"default_family": "sd9"}, "default_family"), ({"device": "cuda:999"}, "device")]
)
def test_a_setting_that_the_machine_contradicts_is_named(settings, name):
    with pytest.raises(InvalidSetting, match=f"^{name}: "):
        create_app(Settings(**settings))


async def test_every_setting_reaches_its_reader(tmp_path):
    settings = Settings(
        models=tmp_path,
        default_model="a",
        default_family="sdxl",
        device="cpu,cpu",
        cache_bytes=1,
        memory_limit_bytes=2 << 20,
        precision="bf16",
        queue_size=3,
        queue_pixels=4,
        batch_pixels=5,
    )
    engine = build_engine(settings, CollectorRegistry())
    options, limits = engine.options, engine.options.limits
    assert (engine.store.folders, options.default_model, options.precision) == ((tmp_path,), "a", "bf16")
    assert (limits.items, limits.pixels, limits.batch_pixels) == (3, 4, 5)
    assert (options.cache_bytes, options.memory_limit_bytes) == (1, 2 << 20)
    assert [worker.name for worker in engine.workers] == ["cpu:0", "cpu:1"]
    app = create_app(Settings(models=tmp_path, device="cpu", max_body_bytes=6, max_pixels=7, queue_pixels=4))
    assert app.state.context.limits.body_bytes == 6
    assert app.state.context.limits.picture_pixels == 7
    assert app.state.context.limits.pixels == 7  # one picture may always come
    assert app.state.context.room.total == min(2 << 30, host_memory() // 6)
    app = create_app(Settings(models=tmp_path, device="cpu", buffer_bytes=8, max_connections=9))
    assert app.state.context.room.total == 8
    server = server_of(app, Settings(max_connections=9, drain_seconds=3), Listening("127.0.0.2", 1))
    assert (server.config.host, server.config.port, server.drain_seconds) == ("127.0.0.2", 1, 3)
    http: Any = server.config.http
    made = http(config=server.config, server_state=server.server_state, app_state={})
    assert (type(made), made.most) == (Connection, 9)


async def test_pages_of_other_origins_may_ask_where_that_is_set(models):
    page = {"Origin": "https://ui.example"}
    asks = page | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-request-id",
    }
    async with serving(models, default_model="kl") as service:
        assert not any(
            name.startswith("access-control") for name in (await service.get("/models", headers=page)).headers
        )
        assert (await service.request("OPTIONS", "/encode", headers=asks)).status_code == 405
    async with serving(models, default_model="kl", cors_origins="https://ui.example", api_keys="k") as service:
        answer = await service.request("OPTIONS", "/encode", headers=asks)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://ui.example")
        assert "access-control-allow-credentials" not in answer.headers
        answer = await service.post("/encode", content=picture(), headers=page | {"Authorization": "Bearer k"})
        told = set(answer.headers["access-control-expose-headers"].split(", "))
        ours = {name for name in answer.headers if name.startswith("x-")} | {"server-timing"}
        assert ours <= {name.lower() for name in told}
        assert (
            "access-control-allow-origin" in (await service.get("/models", headers=page)).headers
        )  # a 401 is read too
        for origin in ("https://other.example", "https://ui.example.evil", "http://ui.example", "null"):
            other = await service.get("/models", headers={"Origin": origin, "Authorization": "Bearer k"})
            assert "access-control-allow-origin" not in other.headers
            answer = await service.request("OPTIONS", "/encode", headers=asks | {"Origin": origin})
            assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (400, False)


async def test_a_proxys_prefix_is_taken_off_wherever_it_still_is(models):
    async with serving(models, default_model="kl", root_path="/a/vae", api_keys="k") as service:
        key = {"Authorization": "Bearer k"}
        for prefix in ("", "/a/vae"):
            assert (await service.post(f"{prefix}/encode", content=picture(), headers=key)).status_code == 200
            assert (await service.get(f"{prefix}/healthz/live")).status_code == 200
            assert (await service.get(f"{prefix}/")).status_code == 200
            refused(await service.get(f"{prefix}/models"), 401, "unauthorized")
            document = (await service.get(f"{prefix}/openapi.json", headers=key)).json()
            assert document["servers"] == [{"url": "/a/vae"}]
        for other in ("/a/vaes/models", "/a/vae/a/vae/models"):
            refused(await service.get(other, headers=key), 404, "not_found")
        assert service.count("vae_requests_total", op="encode", status="200") == 2


async def test_the_default_family_stands_in_where_nothing_says(models):
    async with serving(models, default_family="sdxl", precision="bf16", default_model="kl") as service:
        row = (await service.get("/models/kl")).json()
        assert (row["family"], row["family_source"]) == ("sdxl", "default")
        assert (await service.post("/encode", content=picture())).headers["X-Plan"] == "bf16/whole"


def test_a_log_line_is_one_json_object():
    record = logging.LogRecord("a", logging.INFO, "f", 1, "two\nlines %s", ("x",), None)
    record.facts = {"status": 200}
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["status"], line["level"]) == ("two\nlines x", 200, "info")


def test_a_log_line_as_text_stays_one_line():
    record = logging.LogRecord("a", logging.INFO, "f", 1, "no model %s", ("x\n2026 CRITICAL \x1b[31m",), None)
    assert TextFormatter("%(levelname)s %(message)s").format(record) == r"INFO no model x\n2026 CRITICAL \x1b[31m"
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    first, *traceback = TextFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert first.startswith("INFO no model")
    assert traceback[0].startswith("Traceback")
