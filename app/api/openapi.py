"""What the OpenAPI document says beyond what FastAPI sees in the handlers."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from app.api.answer import OCTETS
from app.api.errors import MEDIA, STATUS
from app.api.schemas import Problem
from app.store.family import CUSTOM
from app.vae.families import FAMILIES

BINARY = {"type": "string", "format": "binary"}

Responses = dict[int | str, dict[str, Any]]

RETRY = {429: "Seconds until there should be room.", 503: "Seconds until asking again makes sense."}
REQUEST_ID_HEADER = {"X-Request-Id": "The request's, or one made here."}

ANSWER_HEADERS = {
    "X-Model": "The model's name, percent-encoded where it is not ASCII.",
    "X-Model-SHA256": "The hash of its file.",
    "X-Plan": "Precision and execution, like fp16/whole.",
    "X-Plan-Reason": "Why it is not the first choice: low_memory, non_finite, oom or requested.",
    "X-Latents": "scaled or raw.",
    "X-Latents-Family": "The model's family. A decode of an .npy takes it as it is.",
    "X-Warning": "What looks wrong, or is a guess, in one line; the work is done all the same. Else absent.",
    "Server-Timing": "Milliseconds of read, queue, load, compute and write.",
} | REQUEST_ID_HEADER

ENCODED = ANSWER_HEADERS | {
    "X-Posterior": "Of posterior=moments: gaussian, mean and log-variance; or point, the latents. Else absent.",
    "X-Image-Size": "WxH of the original picture; of several of different sizes, each, separated by commas.",
    "X-Image-Fit": "pad, crop or resize: what was done to make it fit; absent where nothing had to be.",
    "X-Image-Offset": "x,y of the first pixel that fit=crop kept; where several differ, each, separated by semicolons.",
}

DECODED = ANSWER_HEADERS | {
    "X-Frames": "Of a clip: how many frames it has.",
    "X-Preview": "Of a preview: linear or tiny:NAME, and ;db=, its PSNR against full decodes, once it is known.",
    "X-Image-Size": "WxH of the picture that is sent; of several of different sizes, each, separated by commas.",
    "X-Image-Fit": "crop, where the picture is the part of the original that was encoded; else absent.",
    "X-Image-Offset": "x,y of that part in the original; where several differ, each, separated by semicolons.",
}

COMPARED = {name: ANSWER_HEADERS[name] for name in ("Server-Timing", "X-Request-Id")} | {
    "X-Image-Size": "WxH of the picture that came."
}

WORK = (400, 404, 406, 408, 413, 415, 429, 503, 504, 507)
"""Statuses of the errors of what reads a body and computes."""


TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "required": False,
    "description": "The caller's patience: 429 or 504 when it will not or did not suffice.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
}

REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "A name for the request, in its answer and in the log: up to 128 of A-Z a-z 0-9 . _ : + / = -. "
    "Instead of any other, or of none, one is made.",
    "schema": {"type": "string"},
}

LATENTS_FAMILY = {
    "name": "X-Latents-Family",
    "in": "header",
    "required": False,
    "description": "The family of latents whose file does not say it; 409 where the model does not decode them.",
    "schema": {"type": "string", "enum": [*FAMILIES, CUSTOM]},
}


_PROBLEM = {MEDIA: {"schema": {"$ref": "#/components/schemas/Problem"}}}  # `Documented` puts it there


def answers(
    description: str, media: Iterable[str], headers: dict[str, str], model: type[BaseModel] | None = None
) -> Responses:
    """The responses of an operation that answers with a file of one of these types, or the JSON of a model.

    application/octet-stream is the name that generators of clients know for a file.
    """
    content = {kind: {"schema": BINARY} for kind in (*media, OCTETS)}
    found: dict[str, Any] = {"description": description, "headers": _headers(headers), "content": content}
    return {200: found | ({"model": model} if model else {})}


def request_body(
    description: str,
    media: Iterable[str],
    *,
    form: bool = False,
    headers: Sequence[dict[str, Any]] = (),
    deadline: bool = True,
) -> dict[str, Any]:
    """The request of such an operation: a file of one of these types, whatever it is called, or a form of several."""
    content: dict[str, Any] = {kind: {"schema": BINARY} for kind in (*media, OCTETS)}
    if form:
        image = {"type": "array", "items": BINARY, "minItems": 1}
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {"image": image}, "required": ["image"]}
        }
    return {
        "parameters": [*([TIMEOUT] if deadline else []), REQUEST_ID, *headers],
        "requestBody": {"description": description, "required": True, "content": content},
    }


def problems(*statuses: int) -> Responses:
    """Responses for errors of these statuses, each with the codes that it has in the one table."""
    found: Responses = {}
    for status in statuses:
        kinds = {kind.code: error for error, kind in STATUS.items() if kind.status == status}
        told = [f"`{code}`: {(error.__doc__ or '').partition(chr(10))[0]}" for code, error in kinds.items()]
        texts = REQUEST_ID_HEADER | ({"Retry-After": RETRY[status]} if status in RETRY else {})
        found[status] = {"description": " ".join(told), "headers": _headers(texts), "content": _PROBLEM}
    return found


def _headers(texts: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()}


PROBLEM: Responses = problems(401, 403, 422, 500) | {
    "default": {"description": "Any other error, in the same form.", "content": _PROBLEM}
}
"""What every operation may answer."""


class Documented(FastAPI):
    """FastAPI, with what its document refers to and no handler returns."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        return document
