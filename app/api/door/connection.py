"""One TCP connection: what it may keep others from. Silent and slow ones end, and there is a most of them."""

import asyncio
import resource
import socket
import struct
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""A request's head must be whole so long after its connection is made, or after its first byte."""
REST_SECONDS = 60.0
"""What was refused before it was read may still be coming for so long."""
TAKE_SECONDS = 30.0
"""A client that takes nothing of its answer for so long is not waited for."""
SPARE = 32
"""Connections over the most: they are served if they ask for the service's health, else told to come back."""


SPARE_FILES = 256
"""Of what the process may open: weights, the watched folder, the devices. The others are connections."""


def connections_for(wanted: int) -> int:
    """How many connections there is room for, at most `wanted`; raises the soft limit of open files to the hard one."""
    needed = wanted + SPARE + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = max(soft, needed) if hard == resource.RLIM_INFINITY else hard
    if soft not in (target, resource.RLIM_INFINITY):
        with suppress(OSError, ValueError):  # a system may have a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(1, soft - SPARE - SPARE_FILES))


class Connection(H11Protocol):
    """uvicorn's own, with patience that ends. `most` connections are served at once."""

    def __init__(self, most: int, **options: Any) -> None:
        super().__init__(**options)
        self.most = most
        self.since = 0.0  # when it began to wait for a request
        self._listening: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request of it is being served."""
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]  # None before the first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Makes room for itself: above the most, the connection that has been idle for longest ends."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self._listen(HEAD_SECONDS)
        if len(self.connections) <= self.most:
            return
        others = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        over = len(others) - self.most
        idle = [each for each in others if each is not self and each.idle]
        if over > 0 and idle:
            min(idle, key=lambda each: each.since).transport.abort()
            over -= 1
        if over > SPARE:
            transport.abort()
        elif over > 0:
            self.app_state = {**self.app_state, "crowded": True}

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends its timers."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._listening, self._writing):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """A byte of a request begins the wait for the whole head."""
        if self.idle and self._listening is None:
            coming = self.conn.their_state is h11.SEND_BODY  # of the request before, which has its answer
            self._listen(REST_SECONDS if coming else HEAD_SECONDS)
        super().data_received(data)
        if not self.idle and self._listening is not None:
            self._listening.cancel()
            self._listening = None

    def on_response_complete(self) -> None:
        """From here on it is idle."""
        self.since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._write()

    def timeout_keep_alive_handler(self) -> None:
        """Closes the connection; what was not taken of an answer does not keep it open."""
        super().timeout_keep_alive_handler()
        self._write()

    def pause_writing(self) -> None:
        """The client takes its answer more slowly than it is written."""
        super().pause_writing()
        self._write()

    def resume_writing(self) -> None:
        """It has taken some."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def _listen(self, seconds: float) -> None:
        self._listening = self.loop.call_later(seconds, self.transport.abort)

    def _write(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        self._writing = self.loop.call_later(TAKE_SECONDS, self._drop)

    def _drop(self) -> None:
        """Ends the connection with all that is on its way, what the system holds of it included."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
