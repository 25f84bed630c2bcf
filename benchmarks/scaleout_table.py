"""What the rounds of `benchmarks.scaleout` came to, beside a simulation of the same: a table, and figures for JSON."""

from collections import Counter
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.fleet import POLICIES, Fleet, Policy
from benchmarks.measured import Round, costs_of, outcome
from benchmarks.trace import Outcome, bursts


@dataclass(frozen=True)
class Asked:
    """What ran."""

    replicas: int
    resident: int  # models that a replica has room for
    models: dict[str, float]
    seconds: float
    rate: float


def simulated(policy: Policy, real: list[Round], asked: Asked) -> Outcome:
    """The same traces through as many replicas that are none."""
    outcomes = []
    for index, one in enumerate(real):
        costs = costs_of(one.done, one.load, seed=index)
        fleet = Fleet(asked.replicas, asked.resident, costs, policy, seed=index)
        outcomes.append(fleet.run(bursts(asked.seconds, asked.rate, asked.models, seed=index)))
    return Outcome(
        [each for one in outcomes for each in one.seconds],
        sum((one.loads for one in outcomes), Counter()),
        sum((one.requests for one in outcomes), Counter()),
        sum(one.batches for one in outcomes),
    )


def row(name: str, found: Outcome) -> dict[str, Any]:
    """The figures of one line of the table."""
    return {
        "name": name,
        "requests": len(found.seconds),
        "p50_ms": round(found.p50 * 1000, 1),
        "p95_ms": round(found.p95 * 1000, 1),
        "mean_ms": round(found.mean * 1000, 1),
        "batches": found.batches,
        "loads": sum(found.loads.values()),
        "loads_by_model": dict(sorted(found.loads.items())),
        "requests_by_replica": sorted(found.requests.values(), reverse=True),
    }


def fate(killed: Round) -> dict[str, Any]:
    """The figures of a round in which a replica was killed."""
    took = [each.seconds for each in killed.done]
    return {
        "requests": len(killed.done),
        "statuses": dict(Counter(each.status for each in killed.done)),
        "tried_again": killed.died,
        "p50_ms": round(median(took) * 1000, 1),
        "p95_ms": round(quantiles(took, n=20)[-1] * 1000, 1),
    }


def summary(found: dict[Policy, list[Round]], killed: dict[Policy, Round], asked: Asked) -> dict[str, Any]:
    """All of it as JSON has it."""
    rows = []
    for policy in POLICIES:
        real = found[policy]
        every = outcome([each for one in real for each in one.done])
        rows.append({"real": row(policy, every), "simulated": row(policy, simulated(policy, real, asked))})
    return {
        "replicas": asked.replicas,
        "models": list(asked.models),
        "resident": asked.resident,
        "rate": asked.rate,
        "routing": rows,
        "killed": {policy: fate(one) for policy, one in killed.items()},
    }


def lines(told: dict[str, Any]) -> list[str]:
    """The table."""
    head = f"{'':24} requests   p50 ms   p95 ms  mean ms  batches  loads  by model        requests by replica"
    text = [f"{told['replicas']} replicas, {len(told['models'])} models, room for {told['resident']} each", head]
    for pair in told["routing"]:
        for kind in ("real", "simulated"):
            one = pair[kind]
            name = one["name"] if kind == "real" else "  simulated"
            by_model = " ".join(str(one["loads_by_model"].get(model, 0)) for model in told["models"])
            figures = f"{one['requests']:8} {one['p50_ms']:8} {one['p95_ms']:8} {one['mean_ms']:8} {one['batches']:8}"
            text.append(f"{name:24} {figures} {one['loads']:6}  {by_model:15} {one['requests_by_replica']}")
    text += [
        f"{policy}, a replica killed: {one['requests']} requests, statuses {one['statuses']}, "
        f"{one['tried_again']} tried again, p50 {one['p50_ms']} ms, p95 {one['p95_ms']} ms"
        for policy, one in told["killed"].items()
    ]
    return text
