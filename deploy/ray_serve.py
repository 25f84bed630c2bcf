"""latentd on Ray Serve: a replica for each GPU, or share of the CPU, with the whole service in it, and one door.

`python -m deploy.ray_serve --replicas 2 --port 8000`, with every setting as a LATENTD_* variable. Ray places replicas,
restarts them, drains them before they go, and says how many there are; queue, batches, cache and admission stay the
engine's. Needs the extra `latentd[ray]`. docs/scaling.md has the rest.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from types import FrameType
from typing import Any

import ray
import uvicorn
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter
from ray.serve.schema import LoggingConfig

from app.api.door.connection import Connection, connections_for
from app.engine.memory import host_memory
from app.errors import Overloaded, Unavailable
from app.logs import configure_logging
from app.main import DEVICE_LOST_STATUS, buffer_bytes, keys_of
from app.server import CLOSING_SECONDS
from app.settings import Settings, check_folders
from deploy.ingress import Door, ReplicaDied, Replicas, create_ingress
from deploy.replica import Answer, Call, Service
from deploy.router import ResidentRouter, on_queued_seconds

NAME = "latentd"

REPORT_SECONDS = 0.25
"""Between two reports of a replica. Each is a call of Ray's one controller, which some hundreds a second keep busy."""

HEALTH_SECONDS = 5.0

PATIENCE_SECONDS = 10.0
"""For the answer of a health check. One that has failed three of them is ended, and its requests run elsewhere."""

MOST_ONGOING = 1 << 20
"""Requests that a replica may have: never the limit. The engine's own queue refuses, with its own Retry-After."""

WAITING = 1000
"""Requests that a door may hold while there is no replica at all."""

QUEUED_SECONDS = 5.0
"""Of work that should wait before a replica at most: autoscaling's aim."""


class Replica:
    """The service, as Ray runs it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        configure_logging(settings.log_format)
        self._stack = AsyncExitStack()
        self._service = await self._stack.enter_async_context(Service(settings))
        self._id = serve.get_replica_context().replica_id.unique_id

    async def answer(self, call: Call) -> Answer:
        """Serves one request, and says who did."""
        answer = await self._service.answer(call)
        self._end_if_lost()
        return replace(answer, headers=[*answer.headers, (b"x-replica", self._id.encode())])

    async def metrics(self) -> tuple[str, str]:
        """Its id and its metrics."""
        return self._id, self._service.metrics()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Its report, in plain values: they pass through processes that know nothing of us."""
        self._end_if_lost()
        return asdict(self._service.report())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What is queued here, and whether anything is being done."""
        return {"queued_seconds": self._service.wait(), "busy": float(self._service.engine.open_requests > 0)}

    async def check_health(self) -> None:
        """Raises where a device is stuck: only a new process helps, and Ray starts one when this was so three times."""
        if not self._service.engine.alive:
            raise RuntimeError("the device is stuck")

    def _end_if_lost(self) -> None:
        """Ends this process where a device is lost, as `latentd serve` does. Its requests run elsewhere then."""
        if self._service.engine.lost is not None:
            sys.stderr.write(f"latentd: the device is lost: {self._service.engine.lost}\n")
            sys.stderr.flush()
            os._exit(DEVICE_LOST_STATUS)

    async def __del__(self) -> None:
        """Ray has let all requests end before this; the engine's own drain comes after them."""
        await self._stack.aclose()


def application(
    settings: Settings,
    replicas: tuple[int, int],
    *,
    gpus: float = 0,
    cpus: float = 1,
    queued_seconds: float = QUEUED_SECONDS,
    replica: type[Replica] = Replica,
    router: type[RequestRouter] | str = ResidentRouter,
) -> serve.Application:
    """The deployment: between `replicas` many, each with so much of a node; started with the fewest."""
    least, most = replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if least < most:
        policy = AutoscalingPolicy(policy_function=partial(on_queued_seconds, seconds=queued_seconds))
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least, max_replicas=most, policy=policy, upscale_delay_s=5, downscale_delay_s=300
            )
        }
    deployment = serve.deployment(
        replica,
        name=NAME,
        **scaling,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        max_ongoing_requests=MOST_ONGOING,
        max_queued_requests=WAITING,
        graceful_shutdown_timeout_s=settings.drain_seconds + CLOSING_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=PATIENCE_SECONDS,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),  # ours has a line for each request
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_routing_stats_period_s=REPORT_SECONDS
        ),
    )
    return deployment.bind(settings)


def replicas_of(handle: DeploymentHandle[Any]) -> Replicas:
    """What the door needs of Ray."""

    async def answer(call: Call) -> Answer:
        response = handle.answer.remote(call)
        try:
            found: Answer = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded(f"too many requests wait for a replica: {error}", retry_after=HEALTH_SECONDS) from error
        except DeploymentUnavailableError as error:
            raise Unavailable("there is no replica, and Ray has given up starting one") from error
        except (RayActorError, ObjectLostError, ReplicaUnavailableError) as error:
            raise ReplicaDied(str(error).partition("\n")[0]) from error
        return found

    async def metrics(seconds: float) -> Sequence[tuple[str, str]]:
        try:
            told: list[Any] = await handle.broadcast("metrics").results_async(timeout_s=seconds, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):  # the latter also of none that this door knows of
            return []
        return [each for each in told if not isinstance(each, BaseException)]

    return Replicas(answer, metrics)


class Server(uvicorn.Server):
    """uvicorn, which does not raise the signal anew at its end: what comes after it ends the replicas."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """No new connections, what was accepted is finished; a second signal ends it at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


def door_of(settings: Settings) -> Door:
    """What the settings let in."""
    api_keys, admin_keys = keys_of(settings)
    return Door(
        body_bytes=settings.max_body_bytes,
        buffer_bytes=buffer_bytes(settings),
        api_keys=api_keys,
        admin_keys=admin_keys,
        metrics_public=settings.metrics_public,
        origins=settings.origins,
        root_path=settings.root_path,
    )


def shared_host(settings: Settings, replicas: int) -> Settings:
    """The settings of one of several CPU replicas of a host: an equal part of what one alone would take."""
    limit = settings.memory_limit_bytes or host_memory()
    part = {"memory_limit_bytes": limit // replicas, "buffer_bytes": buffer_bytes(settings) // replicas}
    return settings.model_copy(update=part)


def serve_door(handle: DeploymentHandle[Any], settings: Settings, host: str, port: int) -> int:
    """Serves the door until a signal; the exit status."""
    config = uvicorn.Config(
        create_ingress(replicas_of(handle), door_of(settings)),
        host=host,
        port=port,
        http=partial(Connection, connections_for(settings.max_connections)),  # type: ignore[arg-type]  # called, and never looked into
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=round(settings.drain_seconds) + CLOSING_SECONDS,
        timeout_keep_alive=30,
    )
    server = Server(config)
    server.run()
    return 0 if server.started else 1


def start_ray(cpus: int, gpus: int | None, store_bytes: int, *, logs: bool = True, proxy: int | None = None) -> None:
    """A cluster of this process's own, which ends with it; without Ray's HTTP proxy, unless it is given a port.

    `logs`: what replicas log comes to this process's stderr too.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a service does not tell others that it runs
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: whatever else runs here would come before it
    ray.init(
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=store_bytes,
        log_to_driver=logs,
        logging_level="WARNING",
    )
    if proxy is not None:
        serve.start(http_options={"host": "127.0.0.1", "port": proxy})


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m deploy.ray_serve", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address of the door; default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")
    parser.add_argument("--replicas", type=_replicas, default=(1, 1), metavar="N|N-M", help="N-M: as many as it needs")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; default %(default)s: on CPUs")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica, as many threads; default %(default)s")
    parser.add_argument("--address", help="a Ray cluster that is there, `auto`: the one of this host; default: our own")
    parser.add_argument("--attach", action="store_true", help="another door before replicas that are there")
    parser.add_argument("--queued-seconds", type=float, default=QUEUED_SECONDS, help="aim of N-M; default %(default)s")
    parser.add_argument(
        "--store-mib",
        type=int,
        default=1024,
        help="shared memory of our own cluster: bodies and answers on their way",
    )
    args = parser.parse_args(argv)
    if args.attach and not args.address:
        parser.error("--attach needs --address: the replicas are in a cluster that is there")
    try:
        settings = Settings()
        check_folders(settings)
    except ValueError as error:  # pydantic's and ours
        parser.error(str(error))
    configure_logging(settings.log_format)
    if args.address:
        ray.init(address=args.address, log_to_driver=False)
    else:  # CPUs are a matter of book-keeping here: as many as are asked for
        start_ray(ceil(args.replicas[1] * args.cpus) + 1, None, args.store_mib << 20)
    serve.start(proxy_location="Disabled")
    if args.attach:
        handle = serve.get_app_handle(NAME)
    else:
        inner = settings.model_copy(
            update={"cors_origins": None}
        )  # the door says it, and once is all that browsers take
        each = inner if args.gpus else shared_host(inner, args.replicas[1])
        app = application(each, args.replicas, gpus=args.gpus, cpus=args.cpus, queued_seconds=args.queued_seconds)
        handle = serve.run(app, name=NAME, route_prefix=None)
    try:
        return serve_door(handle, settings, args.host, args.port)
    finally:
        if not args.address:
            serve.shutdown()
        ray.shutdown()


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
        raise argparse.ArgumentTypeError(f"expected a number of replicas, or the fewest and the most, 1-8, not {text}")
    return int(least), int(most or least)


if __name__ == "__main__":
    raise SystemExit(main())
