"""The app behind uvicorn: where it listens, how signals end it, what it says of what goes wrong outside of requests."""

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.api.context import Context
from app.api.door.connection import Connection, connections_for
from app.api.streams import Streams
from app.engine.engine import Engine
from app.settings import InvalidSetting, Settings
from app.text import reason, shown

log = logging.getLogger("app.server")

CLOSING_SECONDS = 5
"""What connections have for their last answers once draining is over; then uvicorn cuts them."""

NOT_FOR_OTHERS = 0o117  # umask of a Unix socket: its owner and group connect
LOG_AGAIN_SECONDS = 60.0


class Server(uvicorn.Server):
    """uvicorn, which turns readiness red at the signal and stops by itself when a device is lost."""

    def __init__(self, config: uvicorn.Config, engine: Engine, streams: Streams, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine = engine
        self.streams = streams
        self.drain_seconds = drain_seconds
        self._interrupts = 0  # once the end has begun
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._no_files_since = -LOG_AGAIN_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; whatever goes wrong outside of requests comes to `note` then."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self.note)
        await super().startup(sockets)

    def note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs it; that no file can be opened, which may come thousands of times a second, once a minute."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self._no_files_since >= LOG_AGAIN_SECONDS:
            self._no_files_since = loop.time()
            log.error("no connection can be accepted: %s; raise the limit of open files", error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT: no new work, what was accepted is finished, and the exit status is 0.

        A second SIGINT ends what was accepted with a 503 at once, a third one without a word. uvicorn's own would raise
        the signal anew at the end, and the process would seem killed.
        """
        self.engine.draining = True
        if self.should_exit and sig == signal.SIGINT:
            self._interrupts += 1
            self.force_exit = self._interrupts > 1
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ends the process once a device is lost: only a new one helps."""
        return await super().on_tick(counter) or self.engine.lost is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what was accepted: with its answer, or with a 503 after `drain_seconds`."""
        self.streams.end()
        ending = [asyncio.ensure_future(work) for work in (self.engine.drain(self.drain_seconds), self._hurried())]
        await super().shutdown(sockets)
        for work in ending:
            work.cancel()

    async def _hurried(self) -> None:
        await self._hurry.wait()
        await self.engine.drain(0)


@dataclass(frozen=True)
class Listening:
    """Where to listen: at an address, over TLS where there is a certificate, or at a path of this host."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    uds: Path | None = None
    certificate: Path | None = None  # PEM, with the chain behind it
    key: Path | None = None  # None: in the same file


def server_of(app: FastAPI, settings: Settings, at: Listening) -> Server:
    """The app behind uvicorn, which is not started. Raises InvalidSetting for a certificate that cannot be used."""
    config = uvicorn.Config(
        app,
        host=at.host,
        port=at.port,
        ssl_certfile=at.certificate,
        ssl_keyfile=at.key,
        http=partial(Connection, connections_for(settings.max_connections)),  # type: ignore[arg-type]  # called, and never looked into
        ws="none",  # whichever library is installed: it would take connections over
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=round(settings.drain_seconds) + CLOSING_SECONDS,
        timeout_keep_alive=30,
    )
    if at.certificate is not None:
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise InvalidSetting(f"ssl-certfile: {shown(at.certificate)}: {reason(error)}") from error
    context: Context = app.state.context
    return Server(config, context.engine, context.streams, settings.drain_seconds)


@contextmanager
def sockets(at: Listening) -> Iterator[list[socket.socket] | None]:
    """What uvicorn is to listen at; None: it makes that itself. Raises InvalidSetting."""
    if at.uds is None:
        yield None
        return
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            _bind(listener, at.uds)
        except OSError as error:
            raise InvalidSetting(f"uds: {shown(at.uds)}: {reason(error)}") from error
        mine = at.uds.stat()
        log.info("listening at %s", shown(at.uds))
        try:
            yield [listener]
        finally:
            with suppress(OSError):
                if os.path.samestat(mine, at.uds.stat()):  # else a successor's
                    at.uds.unlink()


def _bind(listener: socket.socket, path: Path) -> None:
    """A socket that nobody listens at any more makes way; one in use, and anything else, does not. Raises OSError."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
    before = os.umask(NOT_FOR_OTHERS)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
