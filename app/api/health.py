"""Liveness, readiness and the metrics."""

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.api.context import BEARER, Shared, require_metrics_key
from app.api.openapi import Responses, problems
from app.api.schemas import Health

router = APIRouter(tags=["health"])
FAILING: Responses = {503: {"description": "Failing, in the same form.", "model": Health}}


def _answer(good: bool, **facts: object) -> JSONResponse:
    return JSONResponse({"status": "ok" if good else "failing", **facts}, 200 if good else 503)


@router.get("/healthz/live", response_model=Health, responses=FAILING)
@router.get("/health", include_in_schema=False)
@router.get("/livez", include_in_schema=False)
@router.get("/v2/health/live", include_in_schema=False)
async def live(shared: Shared) -> JSONResponse:
    """Red when a device is lost or its thread is stuck on a batch; load does not touch it."""
    return _answer(shared.engine.alive, lost=shared.engine.lost)


@router.get("/healthz/ready", response_model=Health, responses=FAILING)
@router.get("/readyz", include_in_schema=False)
@router.get("/v2/health/ready", include_in_schema=False)
async def ready(shared: Shared) -> JSONResponse:
    """Red before the first scan of the folder, while draining, and without a working device.

    A default model that is not there is told and no more: its file may come.
    """
    engine = shared.engine
    return _answer(
        engine.ready,
        scanned=engine.scanned,
        device=engine.lost is None,
        draining=engine.draining,
        default_model=engine.default_found,
    )


@router.get("/healthz/startup", response_model=Health, responses=FAILING)
async def startup(shared: Shared) -> JSONResponse:
    """Green once the folder has been scanned and the device has passed its test."""
    return _answer(shared.engine.scanned and shared.engine.self_tested)


@router.get(
    "/metrics",
    dependencies=[Depends(BEARER), Depends(require_metrics_key)],
    response_class=PlainTextResponse,
    responses=problems(401, 403),
)
async def metrics(shared: Shared) -> Response:
    """Prometheus text."""
    shared.engine.forget_gone()
    return Response(generate_latest(shared.metrics.registry), media_type=CONTENT_TYPE_LATEST)
