"""The soak of benchmarks/soak.py, shortened."""

from dataclasses import replace

import pytest

from benchmarks.soak import LEAST_ROUNDS, Quiet, Soak, run

FLAT = Quiet(requests=0, memory=1 << 28, files=20, threads=12, tasks=9)


async def test_every_answer_is_what_the_network_gives_by_itself_and_nothing_is_lost(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = await run(lambda rounds: rounds < 2, size=40, concurrency=8, seed=1, say=lambda line: None)
    assert report.problems == []
    assert report.compared == report.statuses["200"] > 20
    assert [each.requests for each in report.levels] == [40, 80]
    assert all(each.memory > 1 << 26 and each.files > 3 and each.threads > 2 < each.tasks for each in report.levels)


def levels(**growing: int) -> list[Quiet]:
    """Rounds of 1000 requests, in each of which these grow by so much."""
    return [
        replace(FLAT, requests=1000 * index, **{name: getattr(FLAT, name) + index * by for name, by in growing.items()})
        for index in range(2 * LEAST_ROUNDS)
    ]


@pytest.mark.parametrize(("growing", "told"), [("memory", 1 << 20), ("files", 1), ("threads", 1), ("tasks", 1)])
def test_what_grows_is_told(growing, told):
    report = Soak(levels=levels(**{growing: told}))
    report.judge()
    (problem,) = report.problems
    assert problem.startswith(f"{growing} grow")


def test_what_is_flat_or_too_short_is_not():
    for flat in (levels(), levels(memory=1 << 17), levels(files=1)[: LEAST_ROUNDS - 1]):
        report = Soak(levels=flat)
        report.judge()
        assert report.problems == []
