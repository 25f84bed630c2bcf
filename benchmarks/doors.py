"""What a door before Ray's replicas costs: Ray's own HTTP proxy, ours, and none, with bodies of the usual sizes.

`python -m benchmarks.doors`, in a network namespace as `make ray` has one. Each answers the same echo, one request
after the other, in turns; medians, and medians of the rounds' ratios to uvicorn with nothing behind it.
"""

import argparse
import asyncio
import socket
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any

import httpx
import ray
import uvicorn
from fastapi import FastAPI, Request, Response
from ray import serve

from app.settings import Settings
from deploy.ingress import create_ingress
from deploy.ray_serve import door_of, replicas_of
from deploy.replica import Answer, Call, answer

SIZES = ((32 << 10, 512 << 10), (128 << 10, 2 << 20), (2 << 20, 128 << 10))
"""(bytes of the body, bytes of the answer): a latent of 512 px and its PNG, of 1024 px, a photograph to be encoded."""


def echo() -> FastAPI:
    """An app that reads its body and answers `down` bytes."""
    app = FastAPI()

    @app.post("/decode")
    async def decode(request: Request, down: int) -> Response:
        await request.body()
        return Response(bytes(down))

    return app


class Echo:
    """It, as our door reaches it."""

    def __init__(self) -> None:
        self.app = echo()

    async def answer(self, call: Call) -> Answer:
        """Serves one request."""
        return await answer(self.app, call)


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """The app behind uvicorn on a free port; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=30)  # as `serve` has it
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve([listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


async def ask(client: httpx.AsyncClient, url: str, up: int, down: int) -> float:
    """Seconds of one request."""
    began = time.perf_counter()
    reply = await client.post(f"{url}/decode", params={"down": down}, content=bytes(up))
    assert len(reply.content) == down, reply.text[:200]
    return time.perf_counter() - began


async def run(rounds: int, requests: int, port: int) -> None:
    serve.run(serve.deployment(serve.ingress(echo)(type("Proxied", (), {}))).bind(), name="proxied", route_prefix="/")
    handle = await asyncio.to_thread(serve.run, serve.deployment(Echo).bind(), name="ours", route_prefix=None)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60, trust_env=False))
        urls = {
            "uvicorn": await stack.enter_async_context(listening(echo())),
            "our door": await stack.enter_async_context(
                listening(create_ingress(replicas_of(handle), door_of(Settings())))
            ),
            "Ray's proxy": f"http://127.0.0.1:{port}",
        }
        for up, down in SIZES:
            took: dict[str, list[float]] = defaultdict(list)
            for _ in range(rounds):
                for name, url in urls.items():
                    await ask(client, url, up, down)
                    took[name].append(median([await ask(client, url, up, down) for _ in range(requests)]))
            for name, found in took.items():
                ratio = median(mine / bare for mine, bare in zip(found, took["uvicorn"], strict=True))
                size = f"up {up >> 10:5} KiB, down {down >> 10:5} KiB"
                print(f"{size}  {name:12} {median(found) * 1e3:7.1f} ms  x{ratio:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--port", type=int, default=8890, help="of Ray's proxy; default %(default)s")
    args = parser.parse_args()
    ray.init(
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    try:
        asyncio.run(run(args.rounds, args.requests, args.port))
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
