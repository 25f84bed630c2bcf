"""Whether the service of this container lives, asked where its process listens. Exit status 0 or 1."""

import http.client
import socket
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


def lives(words: list[str]) -> bool:
    """The answer of /healthz/live. Raises OSError where nothing answers."""
    path, port = option(words, "uds"), option(words, "port") or "8000"
    # http.client, which unlike urllib sees no proxy settings
    connection = Local(path) if path else http.client.HTTPConnection("127.0.0.1", int(port), timeout=SECONDS)
    with closing(connection):
        connection.request("GET", "/healthz/live")
        return connection.getresponse().status == 200


if __name__ == "__main__":
    sys.exit(not lives(COMMAND.read_text().split("\0")))
