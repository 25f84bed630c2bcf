"""The answer to /encode and /decode: which type the Accept header wants, its bytes, headers that say what happened."""

import re
from typing import Literal
from urllib.parse import quote

import numpy as np
from fastapi import Request, Response

from app.api.errors import MEDIA
from app.api.work import Clock, Done
from app.engine.jobs import Task
from app.errors import NotAcceptable
from app.store.checkpoint import Checkpoint
from app.wire.arrays.npy import write_npy
from app.wire.arrays.npz import write_npz, write_zip
from app.wire.arrays.tensors import write_safetensors
from app.wire.images import OPAQUE, write_image
from app.wire.origin import Origin, texts

NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/x-safetensors"
TORCH = "application/x-pytorch"  # is read and never written
PNG, JPEG, WEBP, AVIF, ZIP = "image/png", "image/jpeg", "image/webp", "image/avif", "application/zip"
PICTURES = (PNG, JPEG, WEBP, AVIF)  # that one picture is answered as
APNG, MULTIPART = "image/apng", "multipart/mixed"
VIDEOS = ("video/mp4", "video/webm", "video/x-matroska")  # with the extra latentd[video]
JSON, OCTETS = "application/json", "application/octet-stream"
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


def latents_body(media: str, arrays: list[np.ndarray], task: Task, origin: Origin) -> bytes:
    """Latents as a file of the type `media`."""
    if media == NPZ:
        return write_npz([array[None] for array in arrays])
    batch = np.stack(arrays)
    if media == NPY:
        return write_npy(batch)
    metadata = {
        "model": task.checkpoint.name,
        "sha256": task.checkpoint.sha256,
        "family": task.checkpoint.family.name,
        "convention": task.latents,
    }
    if task.moments:
        metadata["posterior"] = posterior_of(task, batch[0])
    return write_safetensors(batch, metadata | texts(origin))


def posterior_of(task: Task, moments: np.ndarray) -> Literal["gaussian", "point"]:
    """What moments (C, h, w) are of: twice a latent's channels are a mean and a log-variance."""
    return "gaussian" if len(moments) == 2 * task.checkpoint.family.channels("raw") else "point"


def pictures_body(media: str, arrays: list[np.ndarray], quality: int | None) -> bytes:
    """Pictures as a file of the type `media`; several in those types alone that hold several."""
    if media == NPY:
        return write_npy(np.stack(arrays))
    if media == ZIP:
        return write_zip([(f"{index:04}.png", write_image(array, PNG)) for index, array in enumerate(arrays)])
    return write_image(arrays[0], media, quality=quality)


def without_alpha(media: str, checkpoint: Checkpoint) -> str | None:
    """What is to be said where a model's pictures have alpha and their file has none."""
    lost = media in (*OPAQUE, *VIDEOS) and checkpoint.config.pixel_channels == 4
    return f"{media} has no alpha: the picture is laid over white" if lost else None


def answer(body: bytes, kind: str, done: Done, clock: Clock, origin: Origin) -> Response:
    """A body of this Content-Type, and headers that say what happened to it."""
    return Response(body, media_type=kind, headers=answer_headers(done, clock, origin))


def answer_headers(done: Done, clock: Clock, origin: Origin) -> dict[str, str]:
    """What happened, as headers."""
    told = next((result for result in done.results if result.reason), done.results[0])
    checkpoint = done.task.checkpoint
    headers = {
        "X-Model": header_value(checkpoint.name),
        "X-Model-SHA256": checkpoint.sha256,
        "X-Plan": told.plan,
        "X-Latents": done.task.latents,
        "X-Latents-Family": checkpoint.family.name,
        "Server-Timing": clock.finish(),
    }
    if done.task.moments:
        headers["X-Posterior"] = posterior_of(done.task, done.results[0].array)
    headers |= {f"X-{name.replace('_', '-').title()}": text for name, text in texts(origin).items()}
    if told.reason:
        headers["X-Plan-Reason"] = told.reason
    if done.warning:
        headers["X-Warning"] = header_value(done.warning)
    return headers


def accepted(request: Request) -> str:
    """The request's Accept, however many headers say it."""
    return ", ".join(request.headers.getlist("accept"))


def negotiate(accept: str, offers: tuple[str, ...]) -> str:
    """The offer with the highest weight; the first offer where several tie, or where nothing is asked for.

    JSON that is not among the offers is how errors are wanted: clients made from the OpenAPI document name it, and
    nothing else. application/octet-stream stands for whichever offer is best besides. Raises NotAcceptable naming the
    offers when the header excludes all of them.
    """
    ranges = _ranges(accept, offers)
    if not ranges:
        return offers[0]
    best = max(offers, key=lambda offer: _weight(offer, ranges))
    if max(_weight(best, ranges), ranges.get(OCTETS, 0)) <= 0:
        raise NotAcceptable(f"this answer can be {', '.join(offers)}; the request accepts {accept[:200]}")
    return best


def content_type(accept: str, media: str) -> str:
    """What a body of the type that was negotiated is called: application/octet-stream where that is preferred."""
    ranges = _ranges(accept, (media,))
    return OCTETS if ranges.get(OCTETS, 0) > _weight(media, ranges) else media


def _ranges(accept: str, offers: tuple[str, ...]) -> dict[str, float]:
    ranges = dict(_range(part) for part in accept.split(",") if part.strip())
    return {kind: weight for kind, weight in ranges.items() if kind in offers or kind not in (JSON, MEDIA)}


def _range(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return kind, float(value) if _WEIGHT.fullmatch(value.strip()) else 0.0
    return kind, 1.0


def _weight(offer: str, ranges: dict[str, float]) -> float:
    """The weight of the most specific range that covers the offer."""
    for kind in (offer, offer.split("/", maxsplit=1)[0] + "/*", "*/*"):
        if kind in ranges:
            return ranges[kind]
    return 0.0


def header_value(text: str) -> str:
    """Text as a header may carry it, percent-encoded where it is not printable ASCII, or a blank at either end."""
    inner = text.strip(" ")
    before, after = text[: len(text) - len(text.lstrip(" "))], text[len(text.rstrip(" ")) :] if inner else ""
    return "%20" * len(before) + quote(inner, safe=PRINTABLE) + "%20" * len(after)
