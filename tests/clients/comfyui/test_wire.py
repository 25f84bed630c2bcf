import io
import json
import socket
import threading
import time

import numpy as np
import pytest

from clients.comfyui import wire
from clients.comfyui.wire import HOME, LatentdError, Model, Server, call, model, models, send_array, server_of
from tests.clients.comfyui.service import ok, problem, telling

MOST = 1 << 20


class Cancelled(BaseException):
    """As ComfyUI's own, which is no Exception."""


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_an_address_is_the_nodes_or_the_environments_or_this_machines():
    environment = {"LATENTD_URL": "http://gpu-host:8000/vae/", "LATENTD_KEY": "k"}
    assert server_of(" ", environment) == Server("http://gpu-host:8000/vae", "k")
    assert server_of("http://other:8000", environment) == Server("http://other:8000", None)
    assert server_of("", {}) == Server(HOME, None)


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("http://gpu-host", True),
        ("http://GPU-HOST:80/", True),
        ("https://gpu-host", False),
        ("http://gpu-host:8000", False),
        ("http://gpu-host.example", False),
    ],
)
def test_the_key_is_for_the_environments_service_alone(url, given):
    server = server_of(url, {"LATENTD_URL": "http://gpu-host", "LATENTD_KEY": "k"})
    assert server.key == ("k" if given else None)


def test_a_key_without_an_address_is_for_this_machine():
    assert server_of("", {"LATENTD_KEY": "k"}).key == "k"
    assert server_of("http://other:8000", {"LATENTD_KEY": "k"}).key is None


@pytest.mark.parametrize(
    "url", ["gpu-host:8000", "ftp://x", "http://", "http://x:port", "http://x?y=1", "file:///x", "http://höst"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(LatentdError, match="is no address of a service"):
        server_of(url, {})


def test_a_key_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(LatentdError, match="put the key into LATENTD_KEY") as raised:
        server_of("http://x:secret@host", {})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["a\nb", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused(key):
    with pytest.raises(LatentdError, match="LATENTD_KEY is no key"):
        server_of("", {"LATENTD_KEY": key})


def test_a_name_that_no_host_has_is_named():
    with pytest.raises(LatentdError, match="cannot be reached"):
        call(Server("http://" + "a" * 70), "GET", "/models", most=MOST)


def test_nothing_shows_the_key():
    assert "secret" not in repr(Server("http://x", "secret"))


def test_the_key_and_the_path_before_the_routes_are_sent():
    with telling(ok(b"here")) as told:
        assert call(Server(told.url + "/vae", "k"), "POST", "/encode?a=b", b"body", most=MOST) == b"here"
    asked = told.asked[0]
    assert asked.line == "POST /vae/encode?a=b HTTP/1.1"
    assert asked.body == b"body"
    assert asked.headers["Authorization"] == "Bearer k"


def test_an_array_goes_and_another_comes_back():
    sent, back = np.arange(6, dtype=np.float32).reshape(2, 3).T, np.ones((1, 2), np.float16)
    with telling(ok(npy(back))) as told:
        got = send_array(told.server, "/decode", {"model": "a b"}, sent, "float16", (1, 2), wire.never)
    assert (got == back).all()
    assert (np.load(io.BytesIO(told.asked[0].body)) == sent).all()
    assert told.asked[0].line.startswith("POST /decode?model=a+b ")
    assert told.asked[0].headers["Accept"] == "application/x-npy"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (npy(np.ones((2, 2), np.float16)), r"<f2 \(2, 2\) where float16 \(1, 2\)"),
        (npy(np.ones((1, 2), np.float32)), "<f4"),
        (b"<html>", "sent no array"),
        (npy(np.array([{}, {}])), "sent no array"),
        (b"\x93NUMPY\x01\x00\xff\x0f" + b"-" * 3000, "sent no array"),
        (npy(np.ones((1, 2), np.float16))[:-1], "sent no array"),
        (npy(np.ones((1, 2), np.float16)) + b"more", "sent no array"),
        (b"", "sent no array"),
        (bytes(wire.SLACK_BYTES + 5), "more than the 4100 bytes"),
    ],
)
def test_what_is_not_the_array_is_refused(answer, words):
    with telling(ok(answer)) as told, pytest.raises(LatentdError, match=words):
        send_array(told.server, "/decode", {}, np.ones(1), "float16", (1, 2), wire.never)


def test_an_error_is_the_services_own_words():
    with (
        telling(problem(422, "latents have 4\nchannels")) as told,
        pytest.raises(LatentdError, match=r"latents have 4 channels \(422 some_code, request r1\)$"),
    ):
        call(told.server, "POST", "/decode", b"", most=MOST)


def test_an_error_of_something_between_is_shown_shortened():
    with (
        telling((502, {}, b"<html>" + b"x" * 100_000)) as told,
        pytest.raises(LatentdError, match="status 502, '<html>xxx") as raised,
    ):
        call(told.server, "GET", "/models", most=MOST)
    assert len(str(raised.value)) < 400


def test_a_missing_key_is_told_where_to_put_it():
    with telling(problem(401, "no key")) as told:
        with pytest.raises(LatentdError, match="LATENTD_KEY is for LATENTD_URL alone"):
            call(told.server, "GET", "/models", most=MOST)
        with pytest.raises(LatentdError, match="the key is taken from LATENTD_KEY"):
            call(Server(told.url, "wrong"), "GET", "/models", most=MOST)


def test_a_service_that_says_later_is_asked_again():
    with telling(problem(503, "starting", Retry_After="0"), ok(b"now")) as told:
        assert call(told.server, "POST", "/decode", b"x", most=MOST) == b"now"
    assert len(told.asked) == 2


@pytest.mark.parametrize("headers", [{"Retry_After": "3600"}, {"Retry_After": "soon"}, {}])
def test_a_service_that_says_much_later_is_not_waited_for(headers):
    with telling(problem(429, "the queue is full", **headers)) as told, pytest.raises(LatentdError, match="queue"):
        call(told.server, "POST", "/decode", b"x", most=MOST)
    assert len(told.asked) == 1


def cancel_after(event: threading.Event):
    def check() -> None:
        if event.is_set():
            raise Cancelled

    return check


def test_cancel_ends_the_wait_and_drops_the_connection():
    with telling(wait=True) as told:
        with pytest.raises(Cancelled):
            call(told.server, "POST", "/decode", b"x", most=MOST, check=cancel_after(told.arrived))
        assert told.gone.wait(5)


def test_cancel_ends_the_pause_before_another_try():
    start = time.monotonic()
    with telling(problem(429, "full", Retry_After="50")) as told, pytest.raises(Cancelled):
        call(told.server, "POST", "/decode", b"x", most=MOST, check=cancel_after(told.arrived))
    assert time.monotonic() - start < 10


def test_a_service_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(LatentdError, match=f"latentd at {url} cannot be reached"):
        call(Server(url), "GET", "/models", most=MOST)


def test_what_does_not_speak_http_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answer() -> None:
            end, _ = listener.accept()
            with end:
                end.recv(4096)
                end.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LatentdError, match="broke off or is not HTTP"):
            call(Server(url), "GET", "/models", most=MOST)
        thread.join()


def test_an_answer_before_the_body_is_read_is_understood():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        refusal = b'{"detail": "too large", "code": "too_large", "request_id": "r"}'
        read = threading.Event()

        def answer() -> None:
            end, _ = listener.accept()
            with end:
                end.recv(4096)
                end.sendall(b"HTTP/1.1 413 X\r\nContent-Length: %d\r\n\r\n%s" % (len(refusal), refusal))
                end.shutdown(socket.SHUT_WR)
                while end.recv(1 << 20) and not read.is_set():
                    read.set()  # a little of what is under way, then no more

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LatentdError, match=r"too large|cannot be reached"):
            call(Server(url), "POST", "/encode", bytes(32 << 20), most=MOST)
        thread.join()


ROW = {"name": "x/y z", "family": "sd1", "latent_channels": 4, "spatial_factor": 8, "error": None}


def test_models_are_those_that_can_be_used():
    rows = [{"name": "a", "error": None}, {"name": "b", "error": "truncated"}]
    with telling(ok(json.dumps({"models": rows, "default": "a"}).encode())) as told:
        assert models(told.server) == (["a"], "a")


def test_one_model_is_asked_for_by_its_name():
    with telling(ok(json.dumps(ROW).encode())) as told:
        assert model(told.server, "x/y z", wire.never) == Model("x/y z", "sd1", 4, 8)
    assert told.asked[0].line == "GET /models/x/y%20z HTTP/1.1"


def test_a_model_may_have_alpha():
    with telling(ok(json.dumps(ROW | {"pixel_channels": 4}).encode())) as told:
        assert model(told.server, "x", wire.never).pixel_channels == 4


def test_a_model_that_cannot_be_used_says_why():
    row = {"name": "x", "family": None, "latent_channels": None, "spatial_factor": None, "error": "truncated"}
    with telling(ok(json.dumps(row).encode())) as told, pytest.raises(LatentdError, match="truncated"):
        model(told.server, "x", wire.never)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"models": 1}'])
def test_a_page_of_something_else_is_no_list(answer):
    with telling(ok(answer)) as told, pytest.raises(LatentdError, match="is not latentd"):
        models(told.server)
