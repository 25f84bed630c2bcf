"""A service that answers as it is told, and keeps what it was asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clients.comfyui.wire import Server


@dataclass(frozen=True)
class Asked:
    """One request."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Told:
    """Answers in turn, the last again and again; `gone` is set when a client leaves while it waits for one."""

    answers: list[tuple[int, dict[str, str], bytes]]
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    wait: bool = False
    arrived: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def server(self) -> Server:
        return Server(self.url, None)


def ok(body: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, body


def problem(status: int, detail: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    body = {"status": status, "detail": detail, "code": "some_code", "request_id": "r1"}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


@contextmanager
def telling(*answers: tuple[int, dict[str, str], bytes], wait: bool = False) -> Iterator[Told]:
    """A server on the loopback."""
    told = Told(list(answers), wait=wait)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            told.asked.append(Asked(self.requestline, dict(self.headers), body))
            told.arrived.set()
            if told.wait:
                self.rfile.read(1)  # until the connection ends
                told.gone.set()
                self.close_connection = True
                return
            status, headers, answer = told.answers[min(len(told.asked), len(told.answers)) - 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield told
        finally:
            http.shutdown()
            thread.join()
