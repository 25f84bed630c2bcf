"""Many replicas without any: a discrete-event simulation with the very routing of `deploy.routing`.

What a batch and a load take is handed in as measured; `python -m benchmarks.scaleout` measures both, runs the same
requests through real replicas and through this, and says how far apart they are. `python -m benchmarks.fleet` asks it
for fleets that nobody has here: docs/scaling.md has its tables, and what they assume.
"""

import argparse
import heapq
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from math import ceil
from statistics import fmean

from benchmarks.trace import Ask, Costs, Outcome, bursts, zipf
from deploy.routing import Book, Report, Resident, order

Policy = str
POLICIES: tuple[Policy, ...] = ("resident", "round robin", "two choices")
HASHING: Policy = "hashing"
"""Bounded consistent hashing on the model, as deploy/kubernetes/components/hashing has a gateway do it."""

BOUND = 1.5  # times the mean of a replica's requests, that one may have

REPORT_SECONDS, REPORT_LAG = 0.25, 0.1
"""Between two reports of a replica, and until a router has one: Ray's controller looks and tells every 0.1 s."""


@dataclass(eq=False)
class _Request:
    ask: Ask
    back: float = 0.0  # seconds from its batch's end to the client


class _Replica:
    """The engine's queue, turns, staging, cache and loads, without what they are for."""

    def __init__(self, name: str, capacity: int, costs: Costs, at: Callable[[float, Callable[[], None]], None]) -> None:
        self.name, self.capacity, self.costs, self.at = name, capacity, costs, at
        self.queues: dict[str, deque[_Request]] = {}
        self.served: dict[str, int] = {}
        self.resident: OrderedDict[str, None] = OrderedDict()
        self.loads: Counter[str] = Counter()
        self.requests = self.batches = self.reports = 0
        self.running: list[_Request] = []
        self.running_until = 0.0
        self.staged: list[_Request] = []
        self.cold: list[_Request] = []
        self.cold_ready = True
        self.load_told, self.load_took = costs.expected_load, list[float]()
        self.end: Callable[[list[_Request], float], None]

    def put(self, request: _Request, now: float) -> None:
        """A request arrives in its queue."""
        self.requests += 1
        self.queues.setdefault(request.ask.model, deque()).append(request)
        self.turn(now)

    def turn(self, now: float) -> None:
        """Stages what is next and begins what is staged; as `Worker` does, one batch ahead."""
        while True:
            if not self.staged:
                self.staged = self._next(now)
            if self.running or not self.staged:
                return
            self.running, self.staged = self.staged, []
            seconds = self.costs.batch(len(self.running), now)
            self.batches += 1
            self.running_until = now + seconds
            self.at(self.running_until, lambda: self._ended(self.running_until))

    def _ended(self, now: float) -> None:
        batch, self.running = self.running, []
        self.end(batch, now)
        self.turn(now)

    def _next(self, now: float) -> list[_Request]:
        if self.cold and self.cold_ready:
            batch, self.cold = self.cold, []
            return self._use(batch)
        for model in sorted(self.queues, key=lambda model: self.served.get(model, 0)):
            if model in self.resident:
                return self._use(self._take(model))
            if not self.cold:
                self.cold, self.cold_ready = self._take(model), False
                self._make_room()
                self.loads[model] += 1
                self.load_took.append(self.costs.load(now))
                ready = now + self.load_took[-1]
                self.at(ready, lambda model=model, ready=ready: self._loaded(model, ready))  # type: ignore[misc]
        return []

    def _take(self, model: str) -> list[_Request]:
        self.served[model] = sum(self.loads.values()) + self.batches + len(self.served) + 1
        return list(self.queues.pop(model))

    def _use(self, batch: list[_Request]) -> list[_Request]:
        self.resident.move_to_end(batch[0].ask.model)
        return batch

    def _make_room(self) -> None:
        used = {batch[0].ask.model for batch in (self.running, self.staged) if batch}
        for model in [model for model in self.resident if model not in used]:
            if len(self.resident) < self.capacity:
                return
            del self.resident[model]

    def _loaded(self, model: str, now: float) -> None:
        self.resident[model] = None
        self.cold_ready = True
        self.turn(now)

    def report(self, now: float) -> Report:
        """As a replica tells it, with every model of size 1."""
        self.reports += 1
        waiting = [*self.queues.values(), self.staged, self.cold]
        wait = sum(len(each) for each in waiting) * self.costs.expected_item + max(0.0, self.running_until - now)
        residents = tuple(Resident((model,), "", 1) for model in self.resident)
        if self.load_took:  # as deploy.replica has it
            self.load_told, self.load_took = (self.load_told + fmean(self.load_took)) / 2, []
        return Report(self.reports, residents, self.capacity - len(residents), wait, self.load_told)


class _Router:
    """One door's: what it knows is as old as it is with Ray."""

    def __init__(self, policy: Policy, replicas: Sequence[_Replica], rng: random.Random) -> None:
        self.policy, self.rng = policy, rng
        self.replicas = {replica.name: replica for replica in replicas}
        self.names = list(self.replicas)
        self.book = Book()
        self.reports = {name: replica.report(0.0) for name, replica in self.replicas.items()}
        self.pending: Counter[str] = Counter()
        self.turns = count()
        self.choices = 0
        self.choosing = 0.0  # seconds of the processor that this took, in truth

    def choose(self, model: str, now: float) -> _Replica:
        """Where the next request goes."""
        if self.policy == "round robin":
            return self.replicas[self.names[next(self.turns) % len(self.names)]]
        if self.policy == "two choices":
            two = self.rng.sample(self.names, min(2, len(self.names)))
            return self.replicas[min(two, key=lambda name: self.pending[name])]
        if self.policy == HASHING:
            bound = BOUND * (self.pending.total() + 1) / len(self.names)
            ring = sorted(self.names, key=lambda name: blake2b(f"{model} {name}".encode(), digest_size=8).digest())
            return self.replicas[next(name for name in ring if self.pending[name] + 1 <= ceil(bound))]
        began = time.thread_time()
        best = order(model, [self.book.state(name, report, now) for name, report in self.reports.items()])[0]
        self.choices, self.choosing = self.choices + 1, self.choosing + time.thread_time() - began
        return self.replicas[best]

    def sent(self, replica: _Replica, model: str, now: float) -> None:
        self.pending[replica.name] += 1
        self.book.sent(replica.name, model, now)

    def ended(self, replica: _Replica, model: str, now: float) -> None:
        self.pending[replica.name] -= 1
        self.book.ended(replica.name, model, self.reports[replica.name], now)


@dataclass
class Fleet:
    """So many replicas that hold so many models each, behind some doors."""

    replicas: int
    capacity: int
    costs: Costs
    policy: Policy = "resident"
    doors: int = 1
    seed: int = 0
    choosing: float = 0.0  # seconds of the processor for a choice, after `run`
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=count)

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), what))

    def run(self, asks: Sequence[Ask]) -> Outcome:
        """What becomes of the trace, from an empty fleet."""
        rng = random.Random(self.seed)
        replicas = [_Replica(f"r{index}", self.capacity, self.costs, self._at) for index in range(self.replicas)]
        routers = [_Router(self.policy, replicas, rng) for _ in range(self.doors)]
        seconds: list[float] = []
        sent_by: dict[int, _Router] = {}

        def arrive(ask: Ask) -> None:
            router = rng.choice(routers)
            replica = router.choose(ask.model, ask.at)
            router.sent(replica, ask.model, ask.at)
            way = self.costs.way(ask.at) / 2
            request = _Request(ask, way)
            sent_by[id(request)] = router
            self._at(ask.at + way, lambda: replica.put(request, ask.at + way))

        def end(replica: _Replica, batch: list[_Request], now: float) -> None:
            for request in batch:
                router, back = sent_by.pop(id(request)), now + request.back
                seconds.append(back - request.ask.at)
                self._at(back, lambda router=router, ask=request.ask, back=back: router.ended(replica, ask.model, back))  # type: ignore[misc]

        last = asks[-1].at
        for index, replica in enumerate(replicas):
            replica.end = lambda batch, now, replica=replica: end(replica, batch, now)  # type: ignore[misc]
            if self.policy == "resident":
                self._tell(replica, routers, REPORT_SECONDS * index / self.replicas, last)
        for ask in asks:
            self._at(ask.at, lambda ask=ask: arrive(ask))  # type: ignore[misc]
        while self._events:
            heapq.heappop(self._events)[2]()
        choices = sum(router.choices for router in routers)
        self.choosing = sum(router.choosing for router in routers) / choices if choices else 0.0
        return Outcome(
            seconds,
            sum((replica.loads for replica in replicas), Counter()),
            Counter({replica.name: replica.requests for replica in replicas}),
            sum(replica.batches for replica in replicas),
        )

    def _tell(self, replica: _Replica, routers: Sequence[_Router], when: float, last: float) -> None:
        """Reports from `when` on, for as long as requests come."""

        def tell() -> None:
            report = replica.report(when)
            for router in routers:
                self._at(when + REPORT_LAG, lambda router=router: router.reports.update({replica.name: report}))  # type: ignore[misc]
            if when < last:
                self._tell(replica, routers, when + REPORT_SECONDS, last)

        self._at(when, tell)


CARD = Costs(
    batch=lambda items, _: 0.005 + 0.15 * items,
    load=lambda _: 0.3,
    way=lambda _: 0.03,
    expected_load=0.3,
    expected_item=0.15,
)
"""Assumed, not measured here: SD 1.5 at 1024 px on an RTX 4090 (148 ms in Hugging Face's table of Hybrid Inference),
335 MB of weights at 1.1 GB/s out of the page cache, a PNG of 1024 px and its way."""

FLEETS = ((1, 1), (8, 1), (72, 9))
"""(cards, doors): one, a host, a rack of nine hosts with a door each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--use", type=float, default=0.6, help="of the cards' time; default %(default)s")
    parser.add_argument("--models", type=int, default=40, help="default %(default)s")
    parser.add_argument("--room", type=int, default=8, help="models that a card holds; default %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the trace; default %(default)s")
    args = parser.parse_args()
    print("cards doors  routing       requests   p50 ms   p95 ms  loads  busiest/mean  us a choice")
    for cards, doors in FLEETS:
        asks = bursts(args.seconds, args.use * cards / CARD.expected_item, zipf(args.models))
        for policy in (*POLICIES, HASHING) if cards > 1 else POLICIES[:1]:
            fleet = Fleet(cards, args.room, CARD, policy, doors)
            found = fleet.run(asks)
            most = max(found.requests.values()) * cards / len(asks)
            print(
                f"{cards:5} {doors:5}  {policy:12} {len(asks):9} {found.p50 * 1e3:8.0f} {found.p95 * 1e3:8.0f} "
                f"{sum(found.loads.values()):6} {most:13.2f} {fleet.choosing * 1e6:12.0f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
