"""What Ray asks of us besides serving: which replica a request goes to, and how many replicas there should be."""

import asyncio
import time
from functools import partial
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from deploy.routing import NOTHING, Book, Report, order, replicas_wanted, report_of


class ResidentRouter(RequestRouter):
    """Routes by `deploy.routing`: which replica holds the model, and what is queued before it."""

    def initialize_state(self, **_: Any) -> None:
        """A book of what this router has sent, and the reports that it has read."""
        self.book = Book()
        self._at: dict[str, tuple[ReplicaID, str | None]] = {}  # where requests are by their id, and for which model
        self._read: dict[str, tuple[dict[str, Any], Report]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Notes when reports come: one that is looked at late would seem new, and a replica that hangs alive."""
        now = time.monotonic()
        for each in replicas:
            self.book.came(each.replica_id.unique_id, each.routing_stats.get("number", NOTHING.number), now)
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica a rank of its own, the best first."""
        model = None if pending_request is None else pending_request.args[0].model
        now, replicas = time.monotonic(), {each.replica_id.unique_id: each for each in candidate_replicas}
        self.book.keep(replicas)
        self._read = {name: self._report(name, each.routing_stats) for name, each in replicas.items()}
        states = [self.book.state(name, report, now) for name, (_, report) in self._read.items()]
        ranks = [replicas[name] for name in order(model, states)]
        if ranks and pending_request is not None:
            self._note(ranks[0].replica_id, pending_request)
        return [[replica] for replica in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has it: nearly always the first of the ranks."""
        self._note(replica_id, pending_request)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has its end there."""
        if self._at.get(internal_request_id, (None,))[0] == replica_id:
            self._end(internal_request_id)

    def _report(self, name: str, told: dict[str, Any]) -> tuple[dict[str, Any], Report]:
        before, known = self._read.get(name, (None, NOTHING))
        if told is before:
            return told, known
        found = report_of(told)
        return told, known if found is NOTHING else found  # a controller that has started anew knows nothing yet

    def _note(self, replica_id: ReplicaID, request: PendingRequest) -> None:
        request_id, model = request.metadata.internal_request_id, request.args[0].model
        if self._at.get(request_id, (None,))[0] == replica_id:
            return
        self._end(request_id)
        self._at[request_id] = replica_id, model
        self.book.sent(replica_id.unique_id, model, time.monotonic())
        request.future.add_done_callback(partial(self._left, request_id))

    def _left(self, request_id: str, routed: asyncio.Future[Any]) -> None:
        """Its client may go before it is sent, and then nobody else says that it has ended."""
        if routed.cancelled():
            self._end(request_id)

    def _end(self, request_id: str) -> None:
        if request_id in self._at:
            replica_id, model = self._at.pop(request_id)
            name = replica_id.unique_id
            self.book.ended(name, model, self._read[name][1] if name in self._read else None, time.monotonic())


def on_queued_seconds(context: AutoscalingContext, seconds: float) -> tuple[int, dict[str, Any]]:
    """Ray's autoscaling policy: as many replicas as what they told over the last while needs. Ray keeps the bounds."""
    told = {name: found.values() for name, found in context.aggregated_metrics.items()}
    wanted = replicas_wanted(told.get("queued_seconds", ()), told.get("busy", ()), seconds)
    return max(wanted, int(context.total_queued_requests > 0)), {}
