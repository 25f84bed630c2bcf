"""The composition root: reads Settings, builds the engine and the app, and serves. Nothing else reads Settings."""

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics

from app import __version__, startup
from app.allocator import Heap
from app.api import compare, docs, errors, health, models, openapi, page, remote, routes, storing, streaming
from app.api.context import Context, Limits
from app.api.door.access import Access
from app.api.door.bounds import Bounds
from app.api.door.connection import Connection, connections_for
from app.api.door.room import Codecs, Room
from app.api.keys import Keys
from app.api.streams import Streams
from app.api.uploads import Uploads
from app.engine.batcher import QueueLimits
from app.engine.engine import Engine, EngineOptions
from app.engine.gauges import gauges
from app.engine.memory import host_memory
from app.engine.previews import Previews
from app.metrics import Metrics, StateCollector
from app.settings import InvalidSetting, Settings, check_folders
from app.store.store import ModelStore
from app.text import one_line, reason, shown
from app.vae.families import FAMILIES
from app.wire.photographs import photographs

log = logging.getLogger("app.main")

DEVICE_LOST_STATUS = 70  # EX_SOFTWARE: a supervisor starts a fresh process with a fresh context

CLOSING_SECONDS = 5
"""What connections have for their last answers once draining is over; then uvicorn cuts them."""


def build_engine(settings: Settings, registry: CollectorRegistry) -> Engine:
    """The engine as the settings want it, not started; this process is its own. Raises InvalidSetting."""
    _check(settings)
    # What `deterministic` and "fp32" promise on CUDA. Both are switches of the whole process.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False
    disable_created_metrics()  # a second family for each counter and histogram, which nobody plots
    metrics = Metrics(registry)
    options = EngineOptions(
        devices=settings.devices,
        limits=QueueLimits(settings.queue_size, settings.queue_pixels, settings.batch_pixels),
        default_model=settings.default_model,
        cache_bytes=settings.cache_bytes,
        memory_limit_bytes=settings.memory_limit_bytes,
        precision=settings.precision,
        keep_pages=Heap().keep,
    )
    engine = Engine(options, ModelStore(settings.models, settings.default_family), metrics)
    registry.register(StateCollector(partial(gauges, engine)))
    ProcessCollector(registry=registry)
    build = Info("vae_build", "What is running.", registry=registry)
    build.info({"version": __version__, "torch": torch.__version__, "cuda": torch.version.cuda or ""})
    return engine


def _check(settings: Settings) -> None:
    """What a setting alone does not show to be wrong."""
    check_folders(settings)
    if settings.default_family not in FAMILIES:
        raise InvalidSetting(f"default_family: {settings.default_family!r} is none of {', '.join(FAMILIES)}")
    cards = torch.cuda.device_count()
    for name in settings.devices:
        if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= cards:
            raise InvalidSetting(f"device: {name} is not there; torch finds {cards} CUDA devices")


def _keys(name: str, given: frozenset[str], file: Path | None) -> Keys:
    """Raises InvalidSetting."""
    if given and file is not None:
        raise InvalidSetting(f"{name}_file: keys come from {name} or from a file; both are set")
    try:
        return Keys(given, file)
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"{name}_file: {shown(file or '')}: {reason(error)}") from error


def keys_of(settings: Settings) -> tuple[Keys, Keys]:
    """The API keys, and the admin keys. Raises InvalidSetting."""
    return (
        _keys("api_keys", settings.keys, settings.api_keys_file),
        _keys("admin_key", settings.admin_keys, settings.admin_key_file),
    )


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI app; `uvicorn --factory app.main:create_app` works too."""
    settings = settings or Settings()
    engine = build_engine(settings, CollectorRegistry())
    room = Room(buffer_bytes(settings))
    codecs = Codecs(room, os.cpu_count() or 1)
    sketches, previews = Codecs(room, 1), Previews(engine, photographs)
    uploads = Uploads(settings.models, settings.max_upload_bytes)
    api_keys, admin_keys = keys_of(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await uploads.start()
        async with engine:
            await previews.start()
            startup.report(settings, engine, os.environ)
            yield
            await previews.close()
            await engine.drain(settings.drain_seconds)
        await codecs.close()
        await sketches.close()
        await uploads.close()

    app = openapi.Documented(
        title="latentd",
        version=__version__,
        summary="Turns pictures into VAE latents and latents into pictures.",
        lifespan=lifespan,
        openapi_url=None,  # FastAPI's own routes for it would be open to everybody: see api/docs.py
        generate_unique_id_function=lambda route: route.name,  # names for the functions of generated clients
    )
    app.state.context = Context(
        engine=engine,
        metrics=engine.metrics,
        limits=Limits(
            body_bytes=settings.max_body_bytes,
            picture_pixels=settings.max_pixels,
            items=settings.queue_size,
            pixels=max(settings.queue_pixels, settings.max_pixels),
        ),
        room=room,
        codecs=codecs,
        uploads=uploads,
        previews=previews,
        streams=Streams(),
        sketches=sketches,
        api_keys=api_keys,
        admin_keys=admin_keys,
        metrics_public=settings.metrics_public,
    )
    latents = (routes.router, streaming.router, remote.router, compare.router)
    for router in (*latents, models.admin, storing.router, models.router, health.router, docs.router, page.router):
        app.include_router(router)
    errors.install(app)
    app.add_middleware(Bounds, room=room)
    app.add_middleware(Access, metrics=engine.metrics)
    return app


BUFFER_BYTES, BUFFER_SHARE = 2 << 30, 6
"""The default of that setting; where the host has little memory, what tensors may take of it over this."""


def buffer_bytes(settings: Settings) -> int:
    """What bodies, pictures at work and answers may take together."""
    return settings.buffer_bytes or min(BUFFER_BYTES, host_memory() // BUFFER_SHARE)


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


def server_of(app: FastAPI, settings: Settings, host: str, port: int) -> Server:
    """The app behind uvicorn, which is not started."""
    context: Context = app.state.context
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=partial(Connection, connections_for(settings.max_connections)),  # type: ignore[arg-type]  # called, and never looked into
        ws="none",  # whichever library is installed: it would take connections over
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=round(settings.drain_seconds) + CLOSING_SECONDS,
        timeout_keep_alive=30,
    )
    return Server(config, context.engine, context.streams, settings.drain_seconds)


def serve(settings: Settings, host: str, port: int) -> int:
    """Runs the service until a signal; the exit status."""
    app = create_app(settings)
    configure_logging(settings.log_format)
    context: Context = app.state.context
    server = server_of(app, settings, host, port)
    with suppress(SystemExit):  # uvicorn's way of saying that it could not start; the log has the reason
        server.run()
    if context.engine.lost is not None:
        sys.stderr.write(f"latentd: the device is lost: {context.engine.lost}\n")
        sys.stderr.flush()
        os._exit(DEVICE_LOST_STATUS)  # a thread may hang in the driver; an ordinary exit would wait for it
    return 0 if server.started else 1


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, with the facts that an access line carries."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """One line a record, whatever stands in the names and texts that it tells of; a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """The line, with escapes for what would break it."""
        return one_line(super().formatMessage(record))


def configure_logging(log_format: str) -> None:
    """Logs to stderr, as text or JSON."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
