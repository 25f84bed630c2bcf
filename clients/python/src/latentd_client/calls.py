"""The calls of the service, each once, as generators of steps: what is asked, and what its answer means."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote

import httpx

from latentd_client.bodies import (
    LATENTS,
    NPY,
    PICTURES,
    WEBP,
    ZIP,
    Array,
    Pathname,
    Picture,
    latents_body,
    media_of,
    picture_body,
    picture_file,
    write_file,
)
from latentd_client.errors import UnexpectedAnswer
from latentd_client.parts import MIXED
from latentd_client.results import Change, Comparison, Convention, Decoded, Encoded, Model
from latentd_client.steps import Policy, Send, Steps, Work, exchange

Fit = Change | Literal["error"]
Precision = Literal["auto", "fp16", "bf16", "fp32"]
Tiling = Literal["auto", "never", "always"]
Latents = Encoded | Pathname | bytes | Array
How = Literal["true", "linear", "tiny"]
"""A preview by a tiny autoencoder, by a linear map, or by the first of these that there is."""
ONE = {suffix: media for suffix, media in PICTURES.items() if media not in (NPY, ZIP)}
JSON = frozenset({"application/json"})
SHEET_BYTES = 512 << 20
"""Of a part of a comparison: 64 models have a sheet of 4096 x 4096 pixels."""

T = TypeVar("T")


def encode(
    policy: Policy,
    picture: Picture,
    *,
    model: str | None = None,
    latents: Convention | None = None,
    posterior: Literal["mode", "sample", "moments"] | None = None,
    seed: int | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    fit: Fit | None = None,
    background: str | None = None,
    precision: Precision | None = None,
    tiling: Tiling | None = None,
    deterministic: bool | None = None,
    to: Pathname | None = None,
    timeout: float | None = None,
) -> Steps[Encoded]:
    """Pictures to latents. What is not said is as the service has it.

    `to` asks for the type that the file's name says (.npy, .npz, .safetensors) and writes it; `timeout` is in seconds,
    repetitions included. Raises LatentdError, and OSError for files.
    """
    media = NPY if to is None else media_of(to, LATENTS)
    content = yield Work(partial(picture_body, picture))
    params = _params(
        model=model,
        latents=latents,
        posterior=posterior,
        seed=seed,
        dtype=dtype,
        fit=fit,
        background=background,
        precision=precision,
        tiling=tiling,
        deterministic=deterministic,
    )
    send = Send("POST", "/encode", params, _headers(media), content)
    response = yield from exchange(policy, send, frozenset({media}), timeout)
    if to is not None:
        yield Work(partial(write_file, to, response.content))
    return Encoded.of(response)


def decode(
    policy: Policy,
    latents: Latents,
    *,
    model: str | None = None,
    convention: Convention | None = None,
    family: str | None = None,
    size: str | None = None,
    fit: Change | None = None,
    offset: str | None = None,
    dtype: Literal["uint8", "float16", "float32"] | None = None,
    quality: int | None = None,
    bits: Literal[8, 16] | None = None,
    precision: Precision | None = None,
    tiling: Tiling | None = None,
    deterministic: bool | None = None,
    to: Pathname | None = None,
    timeout: float | None = None,
) -> Steps[Decoded]:
    """Latents to pictures. What is not said is as the service has it.

    What `encode` gave says its own model, convention, family and picture size. `to` asks for the type that the file's
    name says (.png, .jpg, .webp, .avif, .zip, .npy) and writes it. Raises LatentdError, and OSError for files.
    """
    media = NPY if to is None else media_of(to, PICTURES)
    if isinstance(latents, Encoded) and size is None:
        size, fit, offset = latents.image_size, fit or latents.image_fit, offset or latents.image_offset
    headers, meant = _meant(media, latents, model, convention, family)
    params = meant | _params(
        size=size,
        fit=fit,
        offset=offset,
        dtype=dtype,
        quality=quality,
        bits=bits,
        precision=precision,
        tiling=tiling,
        deterministic=deterministic,
    )
    content = yield from _content(latents)
    send = Send("POST", "/decode", params, headers, content)
    response = yield from exchange(policy, send, frozenset({media}), timeout)
    if to is not None:
        yield Work(partial(write_file, to, response.content))
    return Decoded.of(response)


def preview(
    policy: Policy,
    latents: Latents,
    *,
    how: How = "true",
    model: str | None = None,
    convention: Convention | None = None,
    family: str | None = None,
    size: str | None = None,
    quality: int | None = None,
    to: Pathname | None = None,
    timeout: float | None = None,
) -> Steps[Decoded]:
    """One latent as a cheap picture; `how` says by what, the result's `preview` by what it was and how near it comes.

    A model's first linear one is tried again while its map is fitted. `to` is as of `decode`, one picture. Raises
    LatentdError, and OSError for files.
    """
    media = WEBP if to is None else media_of(to, ONE)
    headers, meant = _meant(media, latents, model, convention, family)
    content = yield from _content(latents)
    send = Send("POST", "/decode", meant | _params(preview=how, size=size, quality=quality), headers, content)
    response = yield from exchange(policy, send, frozenset({media}), timeout)
    if to is not None:
        yield Work(partial(write_file, to, response.content))
    return Decoded.of(response)


def show(
    policy: Policy,
    latents: Latents,
    stream: str,
    *,
    how: How = "true",
    model: str | None = None,
    convention: Convention | None = None,
    family: str | None = None,
    size: str | None = None,
    quality: int | None = None,
    timeout: float | None = None,
) -> Steps[str | None]:
    """Shows a latent to whoever looks on at a stream, unless a newer one comes first; why the one before was not shown.

    It is not tried again: the next step is on its way. Raises LatentdError, of which UnknownStream says that nobody
    looks on, and OSError for files.
    """
    headers, meant = _meant("*/*", latents, model, convention, family)
    content = yield from _content(latents)
    params = meant | _params(stream=stream, preview=how, size=size, quality=quality)
    send = Send("POST", "/preview/stream", params, headers, content)
    response = yield from exchange(replace(policy, retries=0), send, frozenset({""}), timeout)
    warning = response.headers.get("x-warning")
    return None if warning is None else unquote(warning)


def look(stream: str) -> Send:
    """The request of those who look on, whose answer has no end: `Parts` reads it."""
    return Send("GET", "/preview/stream", {"stream": stream}, {"Accept": f"{MIXED}, */*;q=0.1"})


def models(policy: Policy, *, timeout: float | None = None) -> Steps[list[Model]]:
    """All model files, unreadable ones with their `error`. Raises LatentdError."""
    response = yield from exchange(policy, Send("GET", "/models"), JSON, timeout)
    return _parsed(response, lambda found: [Model.of(row) for row in found["models"]])


def model(policy: Policy, name: str, *, timeout: float | None = None) -> Steps[Model]:
    """One model, by its name or at least 8 digits of its sha256. Raises LatentdError."""
    response = yield from exchange(policy, Send("GET", f"/models/{quote(name)}"), JSON, timeout)
    return _parsed(response, Model.of)


def compare(
    policy: Policy,
    picture: Picture,
    *,
    models: list[str] | None = None,
    fit: Fit | None = None,
    background: str | None = None,
    precision: Precision | None = None,
    tiling: Tiling | None = None,
    timeout: float | None = None,
) -> Steps[Comparison]:
    """One picture through these models, or all, and back: numbers and a contact sheet. Raises LatentdError.

    An array is uint8 (H, W, 3) here.
    """
    content = yield Work(partial(picture_file, picture))
    names = None if models is None else ",".join(models)
    params = _params(models=names, fit=fit, background=background, precision=precision, tiling=tiling)
    send = Send("POST", "/compare", params, _headers(ZIP), content)
    response = yield from exchange(policy, send, frozenset({ZIP}), timeout)
    try:
        with zipfile.ZipFile(io.BytesIO(response.content)) as both:
            return Comparison.of(json.loads(_member(both, "numbers.json")), _member(both, "sheet.png"))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UnexpectedAnswer(f"not the zip of a comparison: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Raises ValueError for what would unpack into more than a sheet has."""
    found = archive.getinfo(name)
    if found.file_size > SHEET_BYTES:
        raise ValueError(f"{name} has {found.file_size} bytes; at most {SHEET_BYTES} are read")
    return archive.read(found)


def _parsed(response: httpx.Response, parse: Callable[[Any], T]) -> T:
    """A JSON answer. Raises UnexpectedAnswer for one that is not what latentd sends."""
    try:
        return parse(response.json())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnexpectedAnswer(f"JSON, but not latentd's: {response.content[:80]!r}", status=200) from error


def _params(**given: Any) -> dict[str, str]:
    """The query: what was said, as the service spells it."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    }


def _content(latents: Latents) -> Steps[bytes]:
    if isinstance(latents, Encoded):
        return latents.content
    content: bytes = yield Work(partial(latents_body, latents))
    return content


def _meant(
    media: str, latents: Latents, model: str | None, convention: Convention | None, family: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Headers and parameters that say what latents are of; what `encode` gave knows it itself."""
    if isinstance(latents, Encoded):
        model, convention, family = model or latents.model, convention or latents.convention, family or latents.family
    of_family = {} if family is None else {"X-Latents-Family": family}
    return _headers(media) | of_family, _params(model=model, latents=convention)


def _headers(media: str) -> dict[str, str]:
    return {"Accept": media, "Content-Type": "application/octet-stream"}
