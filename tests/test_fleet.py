from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.fleet import BOUND, HASHING, POLICIES, Fleet
from benchmarks.measured import Batch, Done, batches, costs_of
from benchmarks.trace import Ask, Costs, bursts, zipf

COSTS = Costs(
    batch=lambda items, _: 1.0 + items, load=lambda _: 10.0, way=lambda _: 0.5, expected_load=10.0, expected_item=2.0
)


def at(*times, model="a"):
    return [Ask(time, model) for time in times]


def test_a_request_alone_waits_for_its_load_and_its_batch():
    found = Fleet(1, 1, COSTS).run(at(0.0))
    assert found.seconds == [0.5 + 10 + 2]
    assert (found.loads, found.requests, found.batches) == (Counter("a"), Counter({"r0": 1}), 1)


def test_what_waits_for_one_model_shares_a_batch_and_the_next_is_staged_meanwhile():
    found = Fleet(1, 1, replace(COSTS, load=lambda _: 0.0)).run(at(0.0, 0.1, 0.2, 5.0))
    # the first alone until 2.25; the second is staged as it comes, so the third is not in its batch
    assert sorted(found.seconds) == pytest.approx(sorted([2.5, 4.4, 6.3, 3.5]))
    assert found.batches == 4


def test_a_cold_model_is_overtaken_while_it_loads():
    asks = [Ask(0.0, "a"), Ask(20.0, "b"), Ask(20.1, "a")]
    found = Fleet(1, 2, COSTS).run(asks)
    assert found.seconds == pytest.approx([12.5, 2.5, 12.5])


def test_the_least_recently_used_model_goes():
    asks = [Ask(100.0 * index, model) for index, model in enumerate("abacb")]
    found = Fleet(1, 2, COSTS).run(asks)
    assert found.loads == Counter("abcb")


@pytest.mark.parametrize("policy", [*POLICIES, HASHING])
def test_every_request_has_one_answer(policy):
    asks = bursts(30, 8, zipf(6))
    found = Fleet(4, 2, replace(COSTS, batch=lambda items, _: 0.05 * items, load=lambda _: 0.2), policy, doors=3).run(
        asks
    )
    assert len(found.seconds) == found.requests.total() == len(asks)
    assert min(found.seconds) == pytest.approx(0.5 + 0.05)


def test_routing_by_what_is_resident_loads_less_than_chance_does():
    asks = bursts(60, 8, zipf(6))
    costs = Costs(lambda items, _: 0.02 * items, lambda _: 0.2, lambda _: 0.01, expected_load=0.2, expected_item=0.02)
    resident, *others = (Fleet(4, 2, costs, policy).run(asks).loads.total() for policy in POLICIES)
    assert all(2 * resident < other for other in others)


def test_hashing_keeps_a_model_together_and_lets_a_hot_one_spread():
    costs = replace(COSTS, load=lambda _: 0.0)
    cold = Fleet(4, 4, costs, HASHING).run(at(*(100.0 * index for index in range(5))))
    assert len(+cold.requests) == 1
    hot = Fleet(4, 4, costs, HASHING).run(at(*(0.01 * index for index in range(40))))
    assert max(hot.requests.values()) == BOUND * 40 / 4


def test_a_trace_is_the_same_for_the_same_seed_and_has_its_rate():
    asks = bursts(1000, 5, zipf(3), seed=1)
    assert asks == bursts(1000, 5, zipf(3), seed=1) != bursts(1000, 5, zipf(3), seed=2)
    assert len(asks) == pytest.approx(5000, rel=0.1)
    counts = Counter(ask.model for ask in asks)
    assert counts["model 1"] > counts["model 2"] > counts["model 3"]


def done(sent, compute, model="a", status=200):
    stages = {"queue": 0.1, "load": 0.0, "compute": compute}
    return Done(model, status, sent, 0.2 + compute, "r0", stages)


def test_requests_that_were_told_the_same_time_were_one_forward():
    found = batches([done(0.0, 1.0), done(0.3, 1.0), done(0.3, 2.0), done(0.3, 1.0, "b"), done(0.4, 1.0, status=503)])
    assert found == [Batch(2, 0.1, 1.0), Batch(1, 0.4, 2.0), Batch(1, 0.4, 1.0)]


def test_what_is_drawn_was_measured_about_then():
    slow = [done(float(index), 3.0 + index / 100) for index in range(10)]
    fast = [done(100.0 + index, 1.0 + index / 100) for index in range(10)]
    loaded = replace(slow[0], stages=slow[0].stages | {"load": 0.5})
    costs = costs_of([loaded, *slow[1:], *fast], expected_load=0.7, seed=0)
    assert 2.9 < costs.batch(1, 0.0) < 3.2
    assert 0.9 < costs.batch(1, 105.0) < 1.2
    assert (costs.load(50.0), costs.expected_load) == (0.5, 0.7)
