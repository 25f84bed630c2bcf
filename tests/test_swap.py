"""The hot swaps of benchmarks/swap.py, shortened."""

from itertools import chain

import pytest

from benchmarks.swap import run

PATIENCE_SECONDS = 15.0  # of a machine that runs other things besides; `python -m benchmarks.swap` asks for 2


@pytest.mark.parametrize("room", [{}, {"cache_bytes": "2000000"}], ids=["resident", "evicting each other"])
async def test_no_request_fails_and_every_answer_is_what_its_weights_give(room, monkeypatch):
    """With room for one model at a time, weights are loaded again and again while their files are being replaced."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = await run(3, 6, seed=1, limit=PATIENCE_SECONDS, **room)
    assert report.problems == []
    assert set(report.statuses) == {"200"}
    assert len(report.answers) == 3
    assert len(list(chain.from_iterable(report.swaps.values()))) == 3
