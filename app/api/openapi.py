"""What the OpenAPI document says beyond what FastAPI sees in the handlers; and the routes that serve it."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from app.api.context import GUARD
from app.api.errors import MEDIA
from app.api.schemas import Problem
from app.store.family import CUSTOM
from app.vae.families import FAMILIES

BINARY = {"type": "string", "format": "binary"}

Responses = dict[int | str, dict[str, Any]]

PROBLEM: Responses = {
    "default": {
        "description": "An error, always in this form.",
        "content": {MEDIA: {"schema": Problem.model_json_schema()}},
    }
}

ANSWER_HEADERS = {
    "X-Model": "The model's name, percent-encoded where it is not ASCII.",
    "X-Model-SHA256": "The hash of its file.",
    "X-Plan": "Precision and execution, like fp16/whole.",
    "X-Plan-Reason": "Why it is not the first choice: low_memory, non_finite, oom or requested.",
    "X-Latents": "scaled or raw.",
    "X-Image-Size": "WxH of the original picture; of several of different sizes, each, separated by commas.",
    "X-Request-Id": "The request's, or one made here.",
    "Server-Timing": "Milliseconds of read, queue, load, compute and write.",
}

WARNING = {"X-Warning": "What looks wrong, in one line; absent when nothing does."}

TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "required": False,
    "description": "The caller's patience: 429 or 504 when it will not or did not suffice.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
}

LATENTS_FAMILY = {
    "name": "X-Latents-Family",
    "in": "header",
    "required": False,
    "description": "The family of latents whose file does not say it; 409 where the model does not decode them.",
    "schema": {"type": "string", "enum": [*FAMILIES, CUSTOM]},
}


def answers(description: str, media: Iterable[str], more: dict[str, str] | None = None) -> Responses:
    """The responses of an operation that answers with a file of one of these types; `more` headers than usual."""
    texts = ANSWER_HEADERS | (more or {})
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()}
    content = {kind: {"schema": BINARY} for kind in media}
    return {200: {"description": description, "headers": headers, "content": content}}


def takes(
    description: str, media: Iterable[str], *, form: bool = False, headers: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The request of such an operation: a file of one of these types, or a form of several."""
    content: dict[str, Any] = {kind: {"schema": BINARY} for kind in media}
    if form:
        image = {"type": "array", "items": BINARY, "minItems": 1}
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {"image": image}, "required": ["image"]}
        }
    return {
        "parameters": [TIMEOUT, *headers],
        "requestBody": {"description": description, "required": True, "content": content},
    }


router = APIRouter(include_in_schema=False, dependencies=GUARD)


@router.get("/openapi.json")
async def document(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Swagger UI, whose script and style come from a public CDN."""
    return get_swagger_ui_html(openapi_url="openapi.json", title="latentd")
