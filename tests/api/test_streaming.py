import http.client
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from app.api import preview, streaming, streams
from tests.service import latent, listening, npy, occupied, refused


class Looking:
    """Whoever looks on: reads the parts of an answer as they come."""

    def __init__(self, answer: httpx.Response) -> None:
        kind, _, boundary = answer.headers["Content-Type"].partition('; boundary="')
        assert kind == "multipart/x-mixed-replace"
        self._delimiter = b"--" + boundary.rstrip('"').encode() + b"\r\n"
        self._pieces = answer.iter_raw()
        self._rest = b""
        self._last: str | None = None
        assert self._until(self._delimiter) == b""

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._rest += next(self._pieces)
        found, _, self._rest = self._rest.partition(mark)
        return found

    def part(self) -> tuple[httpx.Headers, bytes]:
        """The next one that is no repetition."""
        while (found := self.any_part())[0]["X-Request-Id"] == self._last:
            pass
        self._last = found[0]["X-Request-Id"]
        return found

    def any_part(self) -> tuple[httpx.Headers, bytes]:
        """The next one, and the delimiter behind it."""
        lines = self._until(b"\r\n\r\n").decode().split("\r\n")
        headers = httpx.Headers(dict(line.split(": ", 1) for line in lines))
        body = self._until(b"\r\n" + self._delimiter)
        assert len(body) == int(headers["Content-Length"])
        return headers, body

    def ends(self) -> bool:
        return b"".join(self._pieces) + self._rest == b""


@pytest.fixture(scope="module")
def server(models):
    with listening(models, default_model="kl") as (server, port):
        yield server, f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is, no tiny preview is dropped for its time."""
    monkeypatch.setattr("app.api.preview.PATIENCE_SECONDS", 60.0)


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server[1], timeout=60) as client:
        yield client


@contextmanager
def looking(client: httpx.Client, name: str = "a") -> Iterator[Looking]:
    with client.stream("GET", f"/preview/stream?stream={name}") as answer:
        assert answer.status_code == 200, answer.read()
        shown = Looking(answer)  # kept: what reads an answer ends it when it goes
        yield shown


def show(client: httpx.Client, query: str = "preview=tiny", seed: int = 0, name: str = "a") -> httpx.Response:
    headers = {"X-Request-Id": f"step-{seed}"}
    return client.post(f"/preview/stream?stream={name}&{query}", content=npy(latent(seed=seed)), headers=headers)


def alone(client: httpx.Client, seed: int) -> httpx.Response:
    """The same preview as an answer; on a busy machine it may be dropped beside the measuring of its error."""
    for _ in range(30):
        answer = client.post("/decode?preview=tiny", content=npy(latent(seed=seed)))
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            break
        time.sleep(1)
    return answer


def streams_of(server):
    return server[0].config.app.state.context.streams._streams


def at_rest(server):
    """Nothing is made, and nothing is measured in the background, as after a first preview."""
    return not server[0].engine.open_requests and not server[0].config.app.state.context.previews._work


def wait(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_step_is_shown_as_it_comes(client):
    with looking(client) as shown:
        for seed in range(3):
            answer = show(client, seed=seed)
            assert (answer.status_code, answer.content) == (202, b"")
            headers, body = shown.part()
            assert (headers["Content-Type"], headers["X-Image-Size"]) == ("image/webp", "32x32")
            assert headers["X-Preview"].startswith("tiny:tiny")
            assert headers["X-Request-Id"] == f"step-{seed}"
            assert body == alone(client, seed).content
        assert show(client, "preview=tiny&size=8x4&quality=20", seed=9).status_code == 202
        assert Image.open(io.BytesIO(shown.part()[1])).size == (8, 4)


def test_the_linear_map_is_fitted_first(client):
    with looking(client) as shown:
        while (answer := show(client, "preview=linear")).status_code == 503:
            assert "being fitted" in refused(answer, 503, "unavailable")
            time.sleep(0.05)
        assert answer.status_code == 202
        assert shown.part()[0]["X-Preview"].startswith("linear;db=")


def test_the_newest_of_those_that_wait_wins(server, client):
    with looking(client) as shown:
        wait(lambda: at_rest(server))
        with occupied(server[0].engine):
            show(client, seed=1)
            wait(lambda: not streams_of(server)["a"].waits)  # it is being made
            for seed in (2, 3, 4):
                assert show(client, seed=seed).status_code == 202
            room = server[0].config.app.state.context.room
            assert 0 < room.used < 4000  # of one that is being made and one that waits
        assert [shown.part()[0]["X-Request-Id"] for _ in range(2)] == ["step-1", "step-4"]
    wait(lambda: room.used == 0)


def test_a_picture_that_is_the_last_for_now_is_sent_twice(server, client):
    """Or Chromium, which looks at the headers of the next part, would show it when another one comes."""
    with looking(client) as shown:
        show(client, seed=1)
        assert shown.any_part() == shown.any_part()
        wait(lambda: at_rest(server))
        with occupied(server[0].engine):
            show(client, seed=2)
            wait(lambda: not streams_of(server)["a"].waits)
            show(client, seed=3)
        assert [shown.any_part()[0]["X-Request-Id"] for _ in range(3)] == ["step-2", "step-3", "step-3"]


def test_without_anybody_who_looks_on_nothing_is_made(client):
    assert "stream=a first" in refused(show(client), 404, "unknown_stream")
    with looking(client, "b"):
        refused(show(client), 404, "unknown_stream")
    for name in ("", "a b", "x" * 65, "%C3%A9"):
        refused(client.get(f"/preview/stream?stream={name}"), 422, "invalid_parameter")


def test_a_latent_is_judged_before_it_is_taken(client, monkeypatch):
    monkeypatch.setattr(streaming, "PIXELS", 500)
    with looking(client) as shown:
        assert "32x32" in refused(show(client), 413, "too_large")
        assert "at most" not in refused(show(client, "preview=tiny&size=33x1"), 422, "invalid_parameter")
        refused(show(client, "preview=tiny&precision=fp32"), 422, "invalid_parameter")
        refused(client.post("/preview/stream?stream=a", content=b"PNG"), 415, "unsupported_media")
        refused(client.post("/preview/stream?stream=a", content=npy(latent(1, 5, 4, 4))), 422, "invalid_latent")
        refused(show(client, "model=none"), 404, "unknown_model")
        assert show(client, "preview=tiny&size=16x16").status_code == 202
        assert shown.part()[0]["X-Image-Size"] == "16x16"


def test_one_that_was_not_made_is_told_of_and_the_next_one_is_shown(server, client, monkeypatch):
    monkeypatch.setattr(preview, "PATIENCE_SECONDS", 0.05)
    stream = streams_of(server)
    with looking(client) as shown:
        with occupied(server[0].engine):
            assert "X-Warning" not in show(client).headers
            time.sleep(0.1)
        wait(lambda: stream["a"]._lost)
        monkeypatch.setattr(preview, "PATIENCE_SECONDS", 60)
        assert show(client, seed=5).headers["X-Warning"].startswith("the last one: ")
        assert shown.part()[0]["X-Request-Id"] == "step-5"
        assert "X-Warning" not in show(client).headers


def test_whoever_looks_on_last_sees_it(server, client):
    with looking(client) as first:
        with looking(client) as second:
            assert first.ends()
            show(client)
            second.part()
        wait(lambda: not streams_of(server))


def test_one_that_has_gone_is_noticed(server, client):
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as made:
        made.sendall(b"GET /preview/stream?stream=gone HTTP/1.1\r\nHost: x\r\n\r\n")
        wait(lambda: "gone" in streams_of(server))
    wait(lambda: "gone" not in streams_of(server))
    refused(show(client, name="gone"), 404, "unknown_stream")


def test_there_is_a_most_at_once(client, monkeypatch):
    monkeypatch.setattr(streams, "STREAMS", 1)
    with looking(client):
        answer = client.get("/preview/stream?stream=b")
        refused(answer, 429, "overloaded")
        assert answer.headers["Retry-After"] == "10"


@pytest.mark.parametrize("bound", ["IDLE_SECONDS", "WHOLE_SECONDS"])
def test_it_ends_where_nothing_comes_and_at_its_end(client, monkeypatch, bound):
    monkeypatch.setattr(streams, bound, 0.1)
    with looking(client) as shown:
        assert shown.ends()


def test_head_does_not_look_on(server, client):
    with looking(client) as shown:
        answer = client.head("/preview/stream?stream=a")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "multipart/x-mixed-replace")
        show(client)
        shown.part()


def test_keys_guard_it_and_the_service_s_end_ends_it(models):
    with listening(models, default_model="kl", api_keys="k", drain_seconds=20) as (server, port):
        address = f"http://127.0.0.1:{port}"
        refused(httpx.get(f"{address}/preview/stream?stream=a"), 401, "unauthorized")
        refused(httpx.post(f"{address}/preview/stream?stream=a"), 401, "unauthorized")
        headers = {"Authorization": "Bearer k"}
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client, looking(client) as shown:
            at = time.monotonic()
            server.should_exit = True
            assert shown.ends()
            assert time.monotonic() - at < 10


class Both:
    """One connection that sends latents and reads their pictures."""

    def __init__(self, port: int, query: str = "preview=tiny") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.putrequest("POST", f"/preview/stream?{query}")
        self._connection.putheader("Transfer-Encoding", "chunked")
        self._connection.putheader("X-Request-Id", "me")
        self._connection.endheaders()
        assert self._connection.sock is not None
        self._socket = self._connection.sock

    def send(self, content: bytes) -> None:
        self._socket.sendall(b"%x\r\n%s\r\n" % (len(content), content))

    def shown(self) -> Looking:
        answer = self._connection.getresponse()
        assert answer.status == 200, answer.read()
        return Looking(httpx.Response(200, headers=answer.getheaders(), content=iter(answer.read1, b"")))

    def close(self) -> None:
        self._socket.close()
        self._connection.close()


@pytest.fixture
def both(server):
    made: list[Both] = []

    def open_one(*options: str) -> Both:
        made.append(Both(int(server[1].rpartition(":")[2]), *options))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


def test_one_connection_sends_latents_and_has_their_pictures(client, both):
    one = both()
    one.send(npy(latent(seed=0)))
    shown = one.shown()
    for step in range(3):
        headers, body = shown.any_part()
        assert (headers["Content-Type"], headers["X-Request-Id"]) == ("image/webp", f"me/{step}")
        assert body == alone(client, step).content
        following = npy(latent(seed=step + 1))
        one.send(following[:30])  # a latent comes in pieces, and the end of one with the beginning of another
        one.send(following[30:])
    assert shown.any_part()[0]["X-Request-Id"] == "me/3"
    one.send(b"")  # the end of the body
    assert shown.ends()


def test_the_newest_of_a_connection_wins_and_the_last_is_always_shown(server, both):
    wait(lambda: at_rest(server))
    with occupied(server[0].engine):
        one = both()
        one.send(npy(latent(seed=0)))
        wait(lambda: server[0].engine.open_requests == 1)
        one.send(b"".join(npy(latent(seed=seed)) for seed in (1, 2, 3)))
        one.send(b"")
        time.sleep(0.2)
    shown = one.shown()
    assert [shown.any_part()[0]["X-Request-Id"] for _ in range(2)] == ["me/0", "me/3"]
    assert shown.ends()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"PNG", "malformed_body"),
        (npy(latent())[:50], "malformed_body"),
        (npy(latent(1, 5, 4, 4)), "invalid_latent"),
        (npy(latent()).replace(b"'<f2'", b"'<f8'"), "invalid_latent"),
        (npy(latent()).replace(b"(1, 4, 4, 4)", b"(1, 4, 99999, 99999)"), "too_large"),
    ],
)
def test_what_is_no_latent_is_the_last_and_said(server, both, sent, code):
    one = both()
    one.send(sent)
    one.send(b"")
    shown = one.shown()
    headers, body = shown.any_part()
    assert (headers["Content-Type"], headers["X-Request-Id"]) == ("application/problem+json", "me/0")
    assert json.loads(body)["code"] == code
    assert shown.ends()
    wait(lambda: not streams_of(server))
    assert server[0].config.app.state.context.room.used == 0


def test_a_family_that_there_is_not_is_refused_before_the_stream_begins(client):
    answer = client.post("/preview/stream", content=npy(latent()), headers={"X-Latents-Family": "sd15"})
    refused(answer, 422, "invalid_parameter")


def test_a_connection_that_goes_ends_its_stream(server, both):
    one = both()
    one.send(npy(latent()))
    one.shown().any_part()
    one.close()
    wait(lambda: not streams_of(server))


def test_a_connection_that_says_nothing_ends(both, monkeypatch):
    monkeypatch.setattr(streaming, "IDLE_SECONDS", 0.1)
    shown = both().shown()
    headers, body = shown.any_part()
    assert (headers["Content-Type"], json.loads(body)["code"]) == ("application/problem+json", "slow_body")
    assert shown.ends()


def test_a_dropped_one_of_a_connection_is_told_and_the_next_is_shown(server, both, monkeypatch):
    wait(lambda: at_rest(server))
    monkeypatch.setattr(preview, "PATIENCE_SECONDS", 0.05)
    with occupied(server[0].engine):
        one = both()
        one.send(npy(latent()))
        time.sleep(0.1)
    shown = one.shown()
    assert json.loads(shown.any_part()[1])["code"] == "overloaded"
    monkeypatch.setattr(preview, "PATIENCE_SECONDS", 60)
    one.send(npy(latent()))
    assert shown.any_part()[0]["Content-Type"] == "image/webp"


def test_one_that_comes_before_its_map_is_fitted_is_told(client, both, monkeypatch):
    monkeypatch.setattr("app.engine.previews.Previews.linear", lambda *_: None)
    one = both("preview=linear")
    one.send(npy(latent()))
    shown = one.shown()
    assert json.loads(shown.any_part()[1])["code"] == "unavailable"
    monkeypatch.undo()
    one.send(npy(latent()))
    assert shown.any_part()[0]["X-Request-Id"] == "me/1"
