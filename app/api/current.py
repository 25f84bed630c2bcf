"""A request's model: what its name means now, and anew where its file is replaced while the request waits."""

from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from app.api.body import while_connected
from app.api.context import Context
from app.store.checkpoint import Checkpoint, CheckpointChanged

RUNS = 4
"""Of one request at most: a file that is replaced faster than it can be read is somebody's mistake."""


async def checkpoint_of(request: Request, model: str | None, shared: Context) -> Checkpoint:
    """The checkpoint of a name, a hash prefix or None, noted for the log and the metrics."""
    checkpoint = await shared.engine.resolve(model)
    request.state.model = checkpoint.name
    return checkpoint


async def with_current(
    request: Request,
    model: str | None,
    shared: Context,
    deadline: float | None,
    run: Callable[[Checkpoint], Awaitable[Response]],
    checkpoint: Checkpoint,
) -> Response:
    """The answer of `run`; where its checkpoint's file was replaced before the weights were loaded, of another run.

    A device that holds the old weights serves with them. The body must be read. Raises what `run` and `checkpoint_of`
    raise: for a file that was removed, UnknownModel.
    """
    for _ in range(RUNS - 1):
        try:
            return await run(checkpoint)
        except CheckpointChanged:
            await while_connected(request, shared.engine.replaced(checkpoint, deadline))
            checkpoint = await checkpoint_of(request, model, shared)
    return await run(checkpoint)
