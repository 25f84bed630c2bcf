import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from app.engine.batcher import Batcher, QueueLimits
from app.engine.jobs import Job, Task
from app.engine.rate import Rate
from app.errors import DeadlineExceeded, Overloaded, TooLarge, Unavailable
from app.metrics import Metrics
from tests.fakes import checkpoint

A, B = checkpoint("a"), checkpoint("b")
LIMITS = QueueLimits(items=64, pixels=1 << 20, batch_pixels=4 * 256)


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def batcher(metrics):
    return Batcher(LIMITS, "cpu", Rate(), metrics)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels) or 0.0


def put(batcher, model=A, side=8, deadline=None, **task):
    """A queued decode of side x side latents: (2 * side) ** 2 pixels."""
    array = np.zeros((4, side, side), np.float16)
    job = Job(Task("decode", model, **task), array, deadline, asyncio.get_running_loop().create_future())
    batcher.put(batcher.admit(1, job.pixels, None, 0.0), [job])
    return job


async def test_a_batch_is_the_head_and_all_of_its_key_up_to_the_pixel_budget(batcher):
    first, other, second, *rest = (put(batcher, side=side) for side in (8, 4, 8, 8, 8, 8))
    assert await batcher.take() == [first, second, *rest[:2]]
    assert await batcher.take() == [other]
    assert await batcher.take() == [rest[2]]
    assert (batcher.items, batcher.pixels) == (0, 0)


async def test_pictures_in_bytes_and_in_floats_share_no_batch(batcher):
    loop, jobs = asyncio.get_running_loop(), []
    for dtype in (np.uint8, np.float32, np.uint8, np.float16):
        jobs.append(Job(Task("encode", A), np.zeros((16, 16, 3), dtype), None, loop.create_future()))
    batcher.put(batcher.admit(4, 4 * 256, None, 0.0), jobs)
    assert await batcher.take() == jobs[::2]
    assert await batcher.take() == jobs[1::2]


async def test_the_head_is_served_even_when_it_is_over_the_budget(batcher):
    big = put(batcher, side=64)
    put(batcher, side=64)
    assert await batcher.take() == [big]


@pytest.mark.parametrize(
    "wish", [{"precision": "fp32"}, {"tiling": "always"}, {"latents": "raw"}, {"output": "uint16"}]
)
async def test_other_wishes_are_another_batch(batcher, wish):
    plain, wishing = put(batcher), put(batcher, **wish)
    assert await batcher.take() == [plain]
    assert await batcher.take() == [wishing]


async def test_a_deterministic_job_runs_alone(batcher):
    jobs = [put(batcher, deterministic=True), put(batcher, deterministic=True)]
    assert [await batcher.take(), await batcher.take()] == [[jobs[0]], [jobs[1]]]


async def test_models_take_turns(batcher):
    """One hot model cannot starve another: the single job is in the very next batch that is taken."""
    hot = [put(batcher, A) for _ in range(50)]
    assert await batcher.take() == hot[:4]  # running
    assert await batcher.take() == hot[4:8]  # prefetched
    single = put(batcher, B)
    assert await batcher.take() == [single]
    assert await batcher.take() == hot[8:12]
    both = put(batcher, B)
    assert await batcher.take() == [both]
    assert await batcher.take() == hot[12:16]


async def test_take_waits_for_an_arrival(batcher):
    taking = asyncio.ensure_future(batcher.take())
    await asyncio.sleep(0)
    assert not taking.done()
    job = put(batcher)
    assert await asyncio.wait_for(taking, 1) == [job]


async def test_a_full_queue_refuses_with_a_retry_after_from_the_measured_rate(batcher, metrics):
    for pixels in (1_000_000, 1000, 1_000_000, 1000):
        batcher.rate.note(A.sha256, "decode", pixels, pixels * 2e-6)
    for _ in range(LIMITS.items):
        put(batcher, side=50)  # 0.01 megapixels: 20 ms each
    with pytest.raises(Overloaded) as error:
        batcher.admit(1, 100, None, 0.0)
    assert error.value.retry_after == pytest.approx(64 * 0.02, rel=0.05)
    assert value(metrics, "vae_rejected_total", reason="queue_full") == 1


async def test_pixels_are_limited_too_but_one_large_request_gets_in(batcher):
    ticket = batcher.admit(1, 2 << 20, None, 0.0)
    with pytest.raises(Overloaded):
        batcher.admit(1, 1, None, 0.0)
    batcher.give_back(ticket)
    batcher.admit(1, 1, None, 0.0)
    assert (batcher.items, batcher.pixels) == (1, 1)


async def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(batcher, metrics):
    for _ in range(3):
        batcher.rate.note(A.sha256, "decode", 1_000_000, 1000.0)
    put(batcher, side=50)  # 10 s of work
    now = time.monotonic()
    with pytest.raises(Overloaded, match="deadline"):
        batcher.admit(1, 100, now + 5, 0.1)
    batcher.admit(1, 100, now + 50, 0.1)
    assert value(metrics, "vae_rejected_total", reason="deadline") == 1


async def test_jobs_without_a_client_or_out_of_time_are_dropped_and_counted(batcher, metrics):
    gone, late, good = put(batcher), put(batcher, deadline=time.monotonic() - 1), put(batcher)
    gone.future.cancel()
    assert await batcher.take() == [good]
    with pytest.raises(DeadlineExceeded):
        late.future.result()
    assert value(metrics, "vae_cancelled_total", stage="queue") == 1
    assert value(metrics, "vae_rejected_total", reason="deadline") == 1
    assert (batcher.items, batcher.pixels) == (0, 0)


async def test_a_queue_of_dead_jobs_is_an_empty_queue(batcher):
    put(batcher).future.cancel()
    taking = asyncio.ensure_future(batcher.take())
    await asyncio.sleep(0)
    job = put(batcher)
    assert await asyncio.wait_for(taking, 1) == [job]


async def test_drain_fails_what_is_queued(batcher):
    jobs = [put(batcher, A), put(batcher, B)]
    batcher.drain(Unavailable("bye"))
    for job in jobs:
        with pytest.raises(Unavailable):
            job.future.result()
    assert batcher.items == 0


async def test_depths_and_age(batcher):
    put(batcher, A)
    put(batcher, A)
    put(batcher, B)
    assert batcher.depths() == {("a", "decode"): 2, ("b", "decode"): 1}
    assert batcher.oldest_age(time.monotonic() + 3) >= 3


async def test_what_is_admitted_staged_and_running_counts_as_work_before_the_next(batcher):
    for pixels in (1_000_000, 1000, 1_000_000, 1000):
        batcher.rate.note(A.sha256, "decode", pixels, pixels * 1e-4)
    ticket = batcher.admit(1, 10_000, None, 1.0)
    assert batcher.wait_seconds() == pytest.approx(1.0)
    job = Job(Task("decode", A), np.zeros((4, 50, 50), np.float16), None, asyncio.get_running_loop().create_future())
    batcher.put(ticket, [job])
    assert batcher.wait_seconds() == pytest.approx(1.0, rel=0.05)
    batch = await batcher.take()
    assert batcher.wait_seconds() == pytest.approx(1.0, rel=0.05)  # taken, but not on the device yet
    expected = batcher.began(batch)
    assert expected - 0.5 < batcher.wait_seconds() <= expected
    batcher.ended()
    assert batcher.wait_seconds() == 0


async def test_a_batch_that_does_not_come_to_run_is_no_work_any_more(batcher):
    batcher.rate.note(A.sha256, "decode", 1_000_000, 100.0)
    put(batcher, side=50)
    batch = await batcher.take()
    assert batcher.wait_seconds() > 0
    batcher.failed(batch)
    assert batcher.wait_seconds() == 0


async def test_an_idle_device_refuses_nothing_for_its_deadline(batcher, metrics):
    """One tiny batch on a cold server says nothing of a large one; only running it can."""
    batcher.rate.note(A.sha256, "decode", 64, 5.0)
    batcher.admit(1, 1000, time.monotonic() + 1, 8300.0)
    assert value(metrics, "vae_rejected_total", reason="deadline") == 0


async def test_only_models_that_may_have_a_turn_have_one(batcher):
    first, second = put(batcher, A), put(batcher, B)
    assert await batcher.take(lambda task: task.checkpoint is B) == [second]
    allowed = set()
    taking = asyncio.ensure_future(batcher.take(lambda task: task.checkpoint.name in allowed))
    await asyncio.sleep(0)
    assert not taking.done()
    allowed.add("a")
    batcher.look_again()
    assert await asyncio.wait_for(taking, 1) == [first]


async def test_a_take_that_is_cancelled_has_taken_nothing(batcher):
    taking = asyncio.ensure_future(batcher.take())
    await asyncio.sleep(0)
    job = put(batcher)
    taking.cancel()
    await asyncio.wait([taking])
    assert taking.cancelled() or taking.result() == [job]
    if taking.cancelled():
        assert await batcher.take() == [job]


async def test_a_large_request_needs_half_of_the_queue_and_not_an_empty_one(batcher):
    batcher.admit(1, LIMITS.pixels // 2, None, 0.0)
    ticket = batcher.admit(1, 3 * LIMITS.pixels, None, 0.0)
    with pytest.raises(Overloaded):  # what comes behind it waits until it has left the queue
        batcher.admit(1, 1, None, 0.0)
    batcher.give_back(ticket)
    batcher.admit(1, 1, None, 0.0)
    with pytest.raises(Overloaded):
        batcher.admit(1, 3 * LIMITS.pixels, None, 0.0)


async def test_the_turns_of_models_served_long_ago_are_forgotten(batcher, monkeypatch):
    monkeypatch.setattr("app.engine.batcher.KNOWN", 3)
    for number in range(9):
        put(batcher, checkpoint(f"model{number}"))
        await batcher.take()
    assert len(batcher._served) == 3


async def test_jobs_take_the_room_of_their_own_pixels_whatever_was_admitted(batcher):
    ticket = batcher.admit(1, 999, None, 0.0)
    job = Job(Task("decode", A), np.zeros((4, 8, 8), np.float16), None, asyncio.get_running_loop().create_future())
    batcher.put(ticket, [job])
    assert (batcher.items, batcher.pixels) == (1, 256)
    assert await batcher.take() == [job]
    assert (batcher.items, batcher.pixels) == (0, 0)


async def test_more_items_than_the_queue_ever_holds_are_not_asked_to_come_back(batcher):
    with pytest.raises(TooLarge, match="65 items"):
        batcher.admit(65, 65, None, 0.0)


async def test_the_same_bytes_as_two_families_are_two_batches(batcher):
    twin = replace(A, family=replace(A.family, name="other"))
    first, second = put(batcher, A), put(batcher, twin)
    assert [await batcher.take(), await batcher.take()] == [[first], [second]]


async def test_lower_ranks_wait_for_all_work_and_count_as_no_wait(batcher):
    spare, later = put(batcher, rank="spare"), put(batcher, rank="later")
    batcher.rate.note(A.sha256, "decode", 256, 1.0)
    assert batcher.wait_seconds() == 0
    work = [put(batcher, B), put(batcher)]
    assert batcher.wait_seconds() > 0
    taken = [await batcher.take() for _ in range(4)]
    assert {id(each[0]) for each in taken[:2]} == {id(each) for each in work}
    assert taken[2:] == [[spare], [later]]


@pytest.mark.parametrize("ranks", [("spare", "later"), ("later", "spare")])
async def test_the_lower_ranks_take_turns_however_many_of_one_come(batcher, ranks):
    many, few = ranks
    first, second = (put(batcher, B, rank=many) for _ in range(2))
    assert await batcher.take() == [first, second]
    put(batcher, B, rank=many)
    one = put(batcher, A, rank=few)
    assert await batcher.take() == [one]
    put(batcher, A, rank=few)
    assert (await batcher.take())[0].task.rank == many


@pytest.mark.parametrize(("device", "said", "most"), [("cpu", None, 1 << 18), ("cuda", None, 4 << 20), ("cpu", 7, 7)])
def test_what_a_batch_may_have_is_the_device_s_where_nobody_says(device, said, most):
    assert QueueLimits(batch_pixels=said).batch_on(device) == most


async def test_a_refusal_says_what_the_queue_holds(batcher):
    for _ in range(64):
        put(batcher)
    with pytest.raises(Overloaded, match="64 of 64 items, 16384 of 1048576 pixels"):
        batcher.admit(1, 1, None, 0.0)


async def test_what_a_request_itself_takes_counts_against_its_deadline(batcher):
    batcher.admit(1, 1, None, 0.5)
    with pytest.raises(Overloaded, match=r"about 20\.5 s"):
        batcher.admit(1, 1, time.monotonic() + 10, 20.0)
    batcher.admit(1, 1, time.monotonic() + 30, 20.0)


async def test_the_age_of_the_oldest(batcher):
    now = time.monotonic()
    assert batcher.oldest_age(now) == 0.0
    for model, queued in ((A, now - 3), (A, now - 2), (B, now - 5)):
        put(batcher, model).queued = queued
    assert batcher.oldest_age(now) == 5.0


async def test_a_deadline_ends_a_job_wherever_it_is_and_says_after_how_long(batcher, metrics):
    waiting, taken, done = put(batcher), put(batcher), put(batcher)
    done.future.cancel()
    for job in (waiting, taken):
        job.queued -= 7
    batcher.expire([waiting, taken, done])
    for job in (waiting, taken):
        with pytest.raises(DeadlineExceeded, match=r"after 7\.\d s"):
            job.future.result()
    assert value(metrics, "vae_rejected_total", reason="deadline") == 2
    put(batcher)
    assert len(await batcher.take()) == 1
    assert value(metrics, "vae_cancelled_total", stage="queue") == 1
    assert (batcher.items, batcher.pixels) == (0, 0)
