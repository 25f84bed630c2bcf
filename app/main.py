"""The composition root: reads Settings, builds the engine and the app, and serves. Nothing else reads Settings."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics

from app import __version__, startup
from app.allocator import Heap
from app.api import compare, docs, health, middleware, models, openapi, page, remote, routes, storing, streaming
from app.api.context import Context, Limits
from app.api.door.room import Codecs, Room
from app.api.keys import Keys
from app.api.streams import Streams
from app.api.uploads import Uploads
from app.engine.batcher import QueueLimits
from app.engine.engine import Engine, EngineOptions
from app.engine.gauges import gauges
from app.engine.memory import host_memory
from app.engine.previews import Previews
from app.logs import configure_logging
from app.metrics import Metrics, StateCollector
from app.server import Listening, server_of, sockets
from app.settings import InvalidSetting, Settings, check_folders
from app.store.store import ModelStore
from app.text import reason, shown
from app.vae.families import FAMILIES
from app.wire.photographs import photographs

if TYPE_CHECKING:
    from app.traces import Spans

log = logging.getLogger("app.main")

DEVICE_LOST_STATUS = 70  # EX_SOFTWARE: a supervisor starts a fresh process with a fresh context


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
    spans = _spans(os.environ)

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
        if spans is not None:
            await asyncio.to_thread(spans.close)

    app = openapi.Documented(
        title="latentd",
        version=__version__,
        summary="Turns pictures into VAE latents and latents into pictures.",
        lifespan=lifespan,
        openapi_url=None,  # FastAPI's own routes for it would be open to everybody: see api/docs.py
        servers=[{"url": settings.root_path}] if settings.root_path else None,
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
    trace = spans.make if spans else None
    middleware.install(app, room, engine.metrics, origins=settings.origins, prefix=settings.root_path, trace=trace)
    return app


ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def _spans(environ: Mapping[str, str]) -> "Spans | None":
    """What makes and sends spans, where OpenTelemetry's own variables say to where; it is not imported otherwise."""
    if not any(environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from app.traces import exporting
    except ModuleNotFoundError as error:
        log.warning("no spans are sent: %s is not installed; pip install 'latentd[otel]'", error.name)
        return None
    return exporting()


BUFFER_BYTES, BUFFER_SHARE = 2 << 30, 6
"""The default of that setting; where the host has little memory, what tensors may take of it over this."""


def buffer_bytes(settings: Settings) -> int:
    """What bodies, pictures at work and answers may take together."""
    return settings.buffer_bytes or min(BUFFER_BYTES, host_memory() // BUFFER_SHARE)


def serve(settings: Settings, at: Listening) -> int:
    """Runs the service until a signal; the exit status. Raises InvalidSetting."""
    configure_logging(settings.log_format)
    app = create_app(settings)
    context: Context = app.state.context
    server = server_of(app, settings, at)
    with sockets(at) as given, suppress(SystemExit):  # how uvicorn says that it could not start; the log has the reason
        server.run(given)
    if context.engine.lost is not None:
        sys.stderr.write(f"latentd: the device is lost: {context.engine.lost}\n")
        sys.stderr.flush()
        os._exit(DEVICE_LOST_STATUS)  # a thread may hang in the driver; an ordinary exit would wait for it
    return 0 if server.started else 1
