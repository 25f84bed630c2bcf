"""The overload of benchmarks/overload.py, shortened."""

from collections import Counter

from benchmarks.overload import measure


async def test_of_five_times_too_much_some_is_answered_and_right_and_the_rest_is_refused_by_the_rules(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    problems, runs = await measure(1.5, 60.0, queue_size=4, factors=(5,), side=64)
    assert problems == []
    assert [run.statuses["200"] > 0 for run in runs] == [True, True]
    statuses = sum((run.statuses for run in runs), start=Counter())
    assert statuses["429"] > 0
    assert set(statuses) <= {"200", "429", "504"}
