import asyncio

import numpy as np
import pytest

from app.engine import rate as module
from app.engine.jobs import Job, Task
from app.engine.rate import Line, Rate
from tests.fakes import checkpoint

A = checkpoint("a")
MEGA = 1_000_000


def test_nothing_is_expected_before_anything_was_measured():
    assert Line().seconds(1.0) == 0
    assert Rate().seconds("a", "decode", MEGA) == 0


@pytest.mark.parametrize(("fixed", "slope"), [(0.05, 1.0), (0.0, 2.0), (0.3, 0.0), (2.0, 40.0)])
def test_batches_of_two_sizes_tell_the_fixed_cost_and_the_slope(fixed, slope):
    line = Line()
    for megapixels in (0.004, 1.0, 0.004, 0.26, 1.0):
        line.note(megapixels, fixed + slope * megapixels)
    for megapixels in (0.004, 0.1, 1.0, 4.0):
        right = fixed + slope * megapixels
        assert line.seconds(megapixels) == pytest.approx(right, rel=0.1, abs=0.01)


def test_one_tiny_batch_on_a_cold_server_does_not_make_a_picture_take_hours():
    """An 8x8 picture in half a second, libraries and first plan included, was 8300 s a megapixel."""
    line = Line()
    line.note(64 / 1e6, 0.53)
    assert line.seconds(0.262) < 2.0
    assert line.seconds(64 / 1e6) == pytest.approx(0.53, rel=0.05)


def test_what_a_first_batch_costs_once_is_soon_forgotten():
    line = Line()
    line.note(0.26, 30.0)
    line.note(0.26, 1.0)
    line.note(0.26, 1.0)
    assert line.seconds(0.26) < 3.0


def test_no_batch_is_expected_to_take_less_than_nothing():
    line = Line()
    line.note(0.01, 1.0)
    line.note(4.0, 0.1)
    line.note(0.01, 1.0)
    assert all(line.seconds(megapixels) >= 0 for megapixels in (0.001, 0.1, 4.0, 64.0))


def test_a_model_that_has_not_run_is_taken_for_the_others():
    rate = Rate()
    for _ in range(3):
        rate.note("a", "decode", MEGA, 10.0)
    assert rate.knows("a", "decode")
    assert not rate.knows("a", "encode")
    assert rate.seconds("b", "decode", MEGA) == pytest.approx(10.0, rel=0.05)


async def test_jobs_of_one_model_share_the_fixed_cost_of_their_batches():
    rate = Rate()
    for megapixels in (0.0025, 0.01, 0.0025, 0.01):
        rate.note(A.sha256, "decode", round(megapixels * MEGA), 1.0)  # a second whatever the size
    loop = asyncio.get_running_loop()
    jobs = [Job(Task("decode", A), np.zeros((4, 25, 25)), None, loop.create_future()) for _ in range(8)]
    assert rate.of(jobs, 8 * 2500) == pytest.approx(1.0, rel=0.1)
    assert rate.of(jobs, 2500) == pytest.approx(8.0, rel=0.1)


def test_rates_of_models_that_ran_long_ago_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "KNOWN", 3)
    rate = Rate()
    for name in "abcab":
        rate.note(name, "decode", MEGA, 1.0)
    rate.note("d", "decode", MEGA, 1.0)
    assert [rate.knows(name, "decode") for name in "abcd"] == [True, True, False, True]
