"""Whether the service of this container lives, asked where its process listens. Exit status 0 or 1."""

import http.client
import socket
import ssl
import sys
from contextlib import closing
from pathlib import Path

SECONDS = 4.0
COMMAND = Path("/proc/1/cmdline")  # of the entrypoint, whatever its arguments are


class Local(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        """See `HTTPConnection.connect`."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)


def option(words: list[str], name: str) -> str | None:
    """The value that a command line gives an option, as `--name value` or `--name=value`."""
    for at, word in enumerate(words):
        if word == f"--{name}" and at + 1 < len(words):
            return words[at + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def connect(words: list[str]) -> http.client.HTTPConnection:
    """To the service of a command line; by http.client, which unlike urllib sees no proxy settings."""
    path, port = option(words, "uds"), int(option(words, "port") or 8000)
    if path:
        return Local(path)
    if option(words, "ssl-certfile"):  # whose name is not that of the loopback
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=SECONDS, context=context)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)


def lives(words: list[str]) -> bool:
    """The answer of /healthz/live. Raises OSError where nothing answers."""
    with closing(connect(words)) as connection:
        connection.request("GET", "/healthz/live")
        return connection.getresponse().status == 200


if __name__ == "__main__":
    sys.exit(not lives(COMMAND.read_text().split("\0")))
