"""The load run of benchmarks/load.py, shortened."""

from benchmarks.load import run


async def test_every_request_ends_results_are_equal_metrics_add_up_and_a_drain_loses_nothing():
    report = await run(count=60, concurrency=12, seed=1, draining=10)
    assert report.problems == []
    assert report.statuses["200"] > 20
    assert sum(count for status, count in report.statuses.items() if status.startswith("4")) > 3
    assert report.compared == 12
    assert report.drained == 10
