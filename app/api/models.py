"""The models: what there is, what would happen, and for the admin what is resident."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.api.context import ADMIN, GUARD, Context, Shared
from app.api.openapi import PROBLEM, problems
from app.api.queries import LoadQuery, NoQuery, PlanQuery
from app.api.schemas import Model, Models, OneModel, Plan, Resident, Statistics
from app.api.work import latent_shape_of, picture_shape
from app.engine.jobs import Task
from app.errors import UnknownModel
from app.store.checkpoint import Checkpoint, read_statistics
from app.store.names import Entry
from app.store.row import row_of
from app.wire.fit import fitted_size

router = APIRouter(prefix="/models", tags=["models"], dependencies=GUARD, responses=PROBLEM)
admin = APIRouter(prefix="/models", tags=["admin"], dependencies=ADMIN, responses=PROBLEM)
Nothing = Annotated[NoQuery, Query()]
Name = Annotated[str, Path(description="A name of GET /models, or at least 8 digits of a sha256.")]


def model_row(entry: Entry, shared: Context) -> Model:
    """One entry of the store with what the engine knows of it."""
    row = Model.model_validate(row_of(entry))
    if not isinstance(entry, Checkpoint):
        return row
    resident = [
        Resident(device=r.device, dtype=r.dtype, bytes=r.bytes, in_use=r.in_use, pinned=r.pinned)
        for r in shared.engine.residencies(entry.sha256)
    ]
    return row.model_copy(update={"fp16": shared.engine.fp16(entry), "resident": resident})


async def _entry(name: str, shared: Context) -> Entry:
    """A model by its name, which may have an error, or by its hash. Raises UnknownModel."""
    for entry in await shared.engine.entries():
        if entry.name == name:
            return entry
    return await shared.engine.resolve(name)


async def _row(name: str, shared: Context) -> Model:
    """The row of a model that has just been changed."""
    return model_row(await _entry(name, shared), shared)


@router.get("", responses=problems(503))
async def list_models(_: Nothing, shared: Shared) -> Models:
    """Every model file of the folder, unreadable ones with their error."""
    rows = [model_row(entry, shared) for entry in await shared.engine.entries()]
    meant = shared.engine.meant()
    return Models(models=rows, default=meant.name if meant else None)


@router.get("/{name:path}/plan", operation_id="plan_model", responses=problems(404, 503))
async def plan(name: Name, query: Annotated[PlanQuery, Query()], shared: Shared) -> Plan:
    """The forecast and the plan for a picture of this size, as things are now."""
    checkpoint = await shared.engine.resolve(name)
    width, height = fitted_size(query.width, query.height, checkpoint.family.size_multiple, "pad")
    task = Task(query.op, checkpoint, precision=query.precision, tiling=query.tiling)
    shape = picture_shape((width, height), task) if query.op == "encode" else latent_shape_of((width, height), task)
    return Plan.model_validate(await shared.engine.plan(task, shape))


@router.get("/{name:path}", operation_id="get_model", responses=problems(404, 503))
async def one_model(name: Name, _: Nothing, shared: Shared) -> OneModel:
    """One row of the list, unreadable or not; of a FLUX.2 model with the statistics that its latents are scaled by."""
    if not name:
        raise UnknownModel("a model's name is missing")
    entry = await _entry(name, shared)
    row = OneModel.model_validate(model_row(entry, shared).model_dump())
    if not isinstance(entry, Checkpoint) or (found := await asyncio.to_thread(read_statistics, entry)) is None:
        return row
    return row.model_copy(update={"statistics": Statistics.model_validate(found)})


@admin.post("/{name:path}/load", operation_id="load_model", responses=problems(404, 409, 503, 507))
async def load(name: Name, query: Annotated[LoadQuery, Query()], shared: Shared) -> Model:
    """Brings the model to every device."""
    checkpoint = await shared.engine.resolve(name)
    await shared.engine.load(checkpoint, query.dtype)
    return await _row(checkpoint.name, shared)


@admin.post("/{name:path}/unload", operation_id="unload_model", responses=problems(404, 409, 503))
async def unload(name: Name, _: Nothing, shared: Shared) -> Model:
    """Removes the model from every device; 409 while it is pinned or in use."""
    checkpoint = await shared.engine.resolve(name)
    shared.engine.unload(checkpoint)
    return await _row(checkpoint.name, shared)


@admin.post("/{name:path}/pin", operation_id="pin_model", responses=problems(404, 503))
async def pin(name: Name, _: Nothing, shared: Shared) -> Model:
    """Keeps the model on the device once it is there."""
    checkpoint = await shared.engine.resolve(name)
    shared.engine.pin(checkpoint, pinned=True)
    return await _row(checkpoint.name, shared)


@admin.post("/{name:path}/unpin", operation_id="unpin_model", responses=problems(404, 503))
async def unpin(name: Name, _: Nothing, shared: Shared) -> Model:
    """Lets the model be evicted again."""
    checkpoint = await shared.engine.resolve(name)
    shared.engine.pin(checkpoint, pinned=False)
    return await _row(checkpoint.name, shared)


@admin.post("/{name:path}/retest", operation_id="retest_model", responses=problems(404, 503))
async def retest(name: Name, _: Nothing, shared: Shared) -> Model:
    """Lets the model begin in fp16 again, whatever overflowed there before."""
    checkpoint = await shared.engine.resolve(name)
    shared.engine.forget_overflow(checkpoint)
    return await _row(checkpoint.name, shared)
