from dataclasses import replace

import pytest

from app.engine.planning import ExecutionPlan, after, candidates, choose, dtypes

W8, W4, W2, W1 = (ExecutionPlan("fp16", "whole", n) for n in (8, 4, 2, 1))
STRIPS, RECOMPUTE = ExecutionPlan("fp16", "strips", 1), ExecutionPlan("fp16", "recompute", 1)


@pytest.mark.parametrize(
    ("wish", "setting", "device", "fp16", "expected"),
    [
        ("auto", "auto", "cuda", "unknown", ("fp16", "fp32")),
        ("auto", "auto", "cuda", "ok", ("fp16", "fp32")),
        ("auto", "auto", "cuda", "overflows", ("fp32",)),
        ("auto", "auto", "cpu", "unknown", ("fp32",)),
        ("auto", "fp32", "cuda", "ok", ("fp32",)),  # --no-half-vae
        ("auto", "fp16", "cpu", "unknown", ("fp16", "fp32")),
        ("auto", "bf16", "cuda", "overflows", ("bf16", "fp32")),
        ("fp16", "fp32", "cuda", "overflows", ("fp16",)),  # asked for in so many words
        ("bf16", "auto", "cpu", "unknown", ("bf16",)),
    ],
)
def test_dtypes(wish, setting, device, fp16, expected):
    assert dtypes(wish, setting, device, fp16) == expected


def test_candidates_walk_from_the_largest_batch_to_recompute():
    assert list(candidates("fp16", "auto", 8, 1000, "cpu")) == [W8, W4, W2, W1, STRIPS, RECOMPUTE]


@pytest.mark.parametrize(("tiling", "expected"), [("never", [W2, W1]), ("always", [STRIPS, RECOMPUTE])])
def test_tiling_is_honoured(tiling, expected):
    assert list(candidates("fp16", tiling, 2, 1000, "cpu")) == expected


def test_a_whole_forward_on_cuda_stays_under_the_index_limit():
    mega = 1024 * 1024
    assert next(candidates("fp16", "auto", 64, mega, "cuda")) == W8
    assert next(candidates("fp16", "auto", 1, 9 * mega, "cuda")) == STRIPS
    assert list(candidates("fp16", "never", 1, 9 * mega, "cuda")) == []
    assert next(candidates("fp16", "auto", 1, 9 * mega, "cpu")) == W1


def test_choose_takes_the_first_that_fits():
    peaks = {W8: 800, W4: 400, W2: 200, W1: 100, STRIPS: 40, RECOMPUTE: 15}
    for available, expected in ((800, W8), (799, W4), (100, W1), (99, STRIPS), (15, RECOMPUTE), (14, None)):
        assert choose(candidates("fp16", "auto", 8, 1000, "cpu"), peaks.__getitem__, available) == expected


def test_after_is_what_is_smaller_than_the_plan_that_failed():
    assert list(after(candidates("fp16", "auto", 8, 1000, "cpu"), W2)) == [W1, STRIPS, RECOMPUTE]
    assert list(after(candidates("fp16", "auto", 1, 1000, "cpu"), RECOMPUTE)) == []


def test_after_serves_groups_that_the_failed_batch_was_no_candidate_of():
    """Eight items ran out of memory: the second four of them have a plan too."""
    assert next(after(candidates("fp16", "auto", 4, 1000, "cpu"), W8)) == W4
    assert next(after(candidates("fp16", "auto", 6, 1000, "cpu"), W8)).batch == 6


def test_recompute_in_all_the_room_there_is_may_be_tried_again_in_less():
    greedy = replace(RECOMPUTE, budget=1000)
    assert list(after(candidates("fp16", "auto", 2, 1000, "cpu"), greedy)) == [RECOMPUTE]
    assert str(greedy) == "fp16/recompute"


def test_a_plan_prints_as_the_header_shows_it():
    assert str(W8) == "fp16/whole"
    assert str(RECOMPUTE) == "fp16/recompute"
