"""PUT and DELETE /models/{name}: files come into the models folder and leave it while the service runs."""

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request

from app.api.answer import OCTETS
from app.api.context import ADMIN, Context, Shared
from app.api.door.body import pieces_of
from app.api.models import Name, Nothing, model_row
from app.api.openapi import BINARY, PROBLEM, problems
from app.api.queries import UploadQuery
from app.api.schemas import Model
from app.errors import (
    DiskFull,
    MalformedBody,
    ModelBusy,
    ModelExists,
    TooLarge,
    Unavailable,
    UnknownModel,
    UnsupportedCheckpoint,
)
from app.store.checkpoint import Checkpoint
from app.store.incoming import Incoming, check_removable, place_for, remove, stem_of
from app.weights.renames import half_of

UPLOAD_SECONDS = 3600.0
"""A file must be here so long after its headers."""
LISTED_SECONDS = 10.0
"""An answer waits so long for the folder to list what was put there, or no longer what was removed."""
PIECE = 1 << 20  # bytes that are written at once

FILE = {
    "description": "The file: safetensors, or what torch.save writes.",
    "required": True,
    "content": {OCTETS: {"schema": BINARY}},
}

router = APIRouter(prefix="/models", tags=["admin"], dependencies=ADMIN, responses=PROBLEM)


@router.put(
    "/{name:path}",
    operation_id="upload_model",
    status_code=201,
    responses=problems(400, 404, 408, 409, 413, 429, 503, 507),
    openapi_extra={"requestBody": FILE},
)
async def upload(request: Request, name: Name, query: Annotated[UploadQuery, Query()], shared: Shared) -> Model:
    """A new model: the file is read and found to be a VAE that is run here before it becomes visible."""
    stem, into = stem_of(name), shared.uploads
    if shared.engine.draining:
        raise Unavailable("the service is shutting down")
    place = await into.run(place_for, into.folders)
    _check_free(place, stem, shared, replace=query.replace)
    announced = int(request.headers.get("content-length", "0")[:18])  # digits: the server has seen to that
    if announced > into.most_bytes:
        raise _too_large(into.most_bytes)
    with into.named(stem):
        file = await into.run(Incoming, place, stem)
        try:
            if announced > await into.run(file.free):
                raise DiskFull(f"the file has {announced} bytes, more than the disk of the models folder has left")
            await _receive(request, file, shared)
            path = await into.run(file.finish)
            found = await into.run(_checked, path, shared)
            if query.sha256 and query.sha256.lower() != found.sha256:
                raise MalformedBody(f"what came has sha256 {found.sha256}, not {query.sha256.lower()}")
            _check_free(place, path.name, shared, replace=query.replace)  # one may have come by itself meanwhile
            path = await into.run(file.publish, replace=query.replace)
        finally:
            await asyncio.shield(into.run(file.discard))
    entry = await shared.engine.folder.listed(path, LISTED_SECONDS)
    request.state.model = stem
    return model_row(entry or found, shared)


@router.delete("/{name:path}", operation_id="delete_model", responses=problems(404, 409, 503))
async def delete(name: Name, _: Nothing, shared: Shared) -> Model:
    """Removes a model's file, and the model from every device; 409 while it is pinned or in use. Its last row."""
    checkpoint = await shared.engine.resolve(name)
    if checkpoint.name != name:
        raise UnknownModel(f"no model {name!r}: it is deleted by its name alone, which is {checkpoint.name}")
    row = model_row(checkpoint, shared)
    check_removable(checkpoint)
    if shared.engine.awaited(checkpoint):
        raise ModelBusy("requests wait for the model: try again when they are done")
    shared.engine.unload(checkpoint)
    await shared.uploads.run(remove, checkpoint)
    await shared.engine.folder.unlisted(checkpoint.path, LISTED_SECONDS)
    return row.model_copy(update={"resident": []})


def _check_free(place: Path, file: str, shared: Context, *, replace: bool) -> None:
    """Raises ModelExists where a model is called as this file, with its suffix or still without one, would be.

    One may be replaced by a file of the same name in the same place: anything else would leave two of one name.
    """
    stem = stem_of(file).casefold()
    for entry in shared.engine.store.entries():
        if stem not in (entry.name.casefold(), entry.path.stem.casefold()):
            continue
        if not replace:
            raise ModelExists(f"there is a model {entry.name}; replace=true puts this one in its place")
        if entry.path.parent != place or entry.path.is_dir() or file not in (entry.path.stem, entry.path.name):
            raise ModelExists(
                f"{entry.name} is {entry.path.name}, which {file} in {place.name} does not replace: delete it first"
            )


def _checked(path: Path, shared: Context) -> Checkpoint:
    """What came. Blocking. Raises UnsupportedCheckpoint."""
    try:
        return shared.engine.store.check(path)
    except UnsupportedCheckpoint as error:
        if half_of(path.stem) is None:
            raise
        raise UnsupportedCheckpoint(
            f"{error}; the halves of a pair are uploaded as one file: `latentd convert` makes it of both"
        ) from error


async def _receive(request: Request, file: Incoming, shared: Context) -> None:
    """The body into the file. Raises TooLarge, SlowBody, ClientGone, DiskFull, and Unavailable at the end of all."""
    size, pieces = 0, bytearray()
    async for piece in pieces_of(request, UPLOAD_SECONDS, "file"):
        if shared.engine.draining:
            raise Unavailable("the service is shutting down")
        pieces += piece
        size += len(piece)
        if size > shared.uploads.most_bytes:
            raise _too_large(shared.uploads.most_bytes)
        if len(pieces) >= PIECE:
            await shared.uploads.run(file.write, pieces)
            pieces = bytearray()
    await shared.uploads.run(file.write, pieces)


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"a model's file has at most {most} bytes here: MAX_UPLOAD_BYTES")
