"""The route of ComfyUI's own server that fills the nodes' lists of models."""

import asyncio
import os

from aiohttp import web
from server import PromptServer

from . import wire


async def models(request: web.Request) -> web.Response:
    """Names of the models of the service at `url`, or of LATENTD_URL's where there is none."""
    try:
        server = wire.server_of(request.query.get("url", ""), os.environ)
        names, _ = await asyncio.to_thread(wire.models, server)
    except wire.LatentdError as error:
        return web.json_response({"error": str(error)}, status=502)
    return web.json_response({"models": names})


def add_route() -> None:
    """Before ComfyUI's server starts, which is when it loads its nodes."""
    PromptServer.instance.routes.get("/latentd/models")(models)
