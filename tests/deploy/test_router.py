"""Ray's side of routing, without a cluster. Needs the extra `ray`: `make ray` runs it."""

import asyncio
from dataclasses import asdict
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", reason="Ray is an extra")

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.request_router import RequestRouter

from app.errors import Overloaded, Unavailable
from deploy.ingress import ReplicaDied
from deploy.ray_serve import replicas_of
from deploy.replica import Call
from deploy.router import ResidentRouter, on_queued_seconds
from deploy.routing import SILENT_SECONDS, Report, Resident

SHA = "5a" * 32


def told(number, *models, wait=0.0):
    return asdict(Report(number, tuple(Resident((name,), SHA, 1) for name in models), 10, wait, 0.5))


def replica(name, stats=None):
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats={} if stats is None else stats)


def request(number, model="a"):
    return SimpleNamespace(
        args=[Call("POST", "/decode", b"", (), b"", model)],
        metadata=SimpleNamespace(internal_request_id=str(number)),
        future=asyncio.get_running_loop().create_future(),
    )


@pytest.fixture
def router():
    made = object.__new__(ResidentRouter)
    made.initialize_state()
    return made


async def first(router, replicas, asked=None):
    ranks = await router.choose_replicas(replicas, asked)
    assert all(len(rank) == 1 for rank in ranks)
    return ranks[0][0].replica_id.unique_id


async def test_replicas_that_have_told_nothing_share_a_burst(router):
    replicas = [replica("1"), replica("2")]
    sent = [await first(router, replicas, request(number, model)) for number, model in enumerate("abcdef")]
    assert sent.count("1") == sent.count("2") == 3


async def test_one_that_comes_while_the_others_work_has_its_part(router):
    old, come = replica("1", told(5, "a", wait=0.9)), replica("2")
    sent = [await first(router, [old, come], request(number)) for number in range(6)]
    assert sent[0] == "2"
    assert "1" in sent
    for number, name in enumerate(sent):
        router.on_request_completed(SimpleNamespace(unique_id=name), str(number))  # of an id that is another object
    await first(router, [old, replica("2", told(9))])


async def test_what_is_known_stays_known_while_a_controller_knows_nothing(router):
    assert await first(router, [replica("1", told(5, "a")), replica("2", told(5))]) in "12"
    for number in range(2):
        assert await first(router, [replica("1"), replica("2")], request(number)) == "1"
        router.on_request_completed(SimpleNamespace(unique_id="1"), str(number))


async def test_a_report_is_as_old_as_it_is_here_and_not_as_the_look_at_it(router, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deploy.router.time.monotonic", lambda: now[0])
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda *_: None)  # a cluster's own

    async def after(seconds, *replicas):
        router.update_replicas(replicas)
        now[0] += seconds
        return await first(router, replicas)

    assert await after(0.0, replica("1", told(1, "a")), replica("2", told(1, wait=5.0))) == "1"
    last = told(2, "a")  # then it hangs, and nobody asks for anything
    assert await after(1.0, replica("1", last), replica("2", told(2, wait=5.0))) == "1"
    router.update_replicas([replica("1", last), replica("2", told(3, wait=5.0))])
    assert await after(SILENT_SECONDS, replica("1", last), replica("2", told(4, wait=9.0))) == "2"


async def test_a_version_that_tells_other_things_is_served_all_the_same(router):
    odd = replica("1", {"mood": "good"})
    assert await first(router, [odd, replica("2", told(1, "b", wait=9.0))], request(0)) == "1"


async def test_a_request_without_any_choice_and_without_any_replica(router):
    assert await router.choose_replicas([], None) == []
    assert await router.choose_replicas([], request(0)) == []
    router.on_request_completed(SimpleNamespace(unique_id="1"), "0")


async def test_a_request_is_where_it_was_sent_and_nowhere_once_its_client_went(router):
    replicas = [replica("1", told(1, "a")), replica("2", told(1))]
    asked = request(0)
    assert await first(router, replicas, asked) == "1"
    router.on_request_routed(asked, replicas[1].replica_id, None)  # the first did not answer
    states = {name: router.book.state(name, report, 0.0) for name, (_, report) in router._read.items()}
    assert (states["1"].pending, states["2"].pending) == (0.0, 0.5)
    asked.future.cancel()
    await asyncio.sleep(0)
    assert router.book.state("2", router._read["2"][1], 0.0).pending == 0.0


class Handle:
    """Of a deployment at which every call ends so."""

    def __init__(self, error):
        async def ended():
            raise error

        self.answer = SimpleNamespace(remote=lambda call: ended())
        self.broadcast = lambda method: SimpleNamespace(results_async=lambda **_: ended())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DeploymentUnavailableError(DeploymentID("latentd")), Unavailable),
        (BackPressureError(1001, 1000), Overloaded),
        (ReplicaUnavailableError("the replica is not there"), ReplicaDied),
        (ActorDiedError(), ReplicaDied),
        (ActorUnavailableError("not now", None), ReplicaDied),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
async def test_what_ray_raises_is_what_the_door_knows(error, expected):
    with pytest.raises(expected):
        await replicas_of(Handle(error)).answer(request(0).args[0])


async def test_metrics_of_no_replica_are_none():
    for error in (DeploymentUnavailableError(DeploymentID("latentd")), TimeoutError()):
        assert await replicas_of(Handle(error)).metrics(1.0) == []


def test_how_many_there_should_be():
    def context(queued=0, **metrics):
        return SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)

    assert on_queued_seconds(context(), 5.0) == (0, {})
    assert on_queued_seconds(context(queued=3), 5.0) == (1, {})
    assert on_queued_seconds(context(busy={"1": 1.0}, queued_seconds={"1": 10.0}), 5.0) == (4, {})
