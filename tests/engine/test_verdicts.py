from dataclasses import replace

from app.engine import verdicts as module
from app.engine.verdicts import RETRY, Verdicts
from tests.fakes import checkpoint

A, B = checkpoint("a"), checkpoint("b")


def tries(verdicts, batches):
    """The batches that try half precision."""
    return [index for index in range(batches) if verdicts.of_batch(A) != "overflows"]


def test_what_the_table_says_holds_until_something_is_seen():
    verdicts = Verdicts()
    assert verdicts.of(replace(A, fp16="ok")) == "ok"
    verdicts.overflowed(A)
    assert (verdicts.of(replace(A, fp16="ok")), verdicts.of(B)) == ("overflows", "unknown")


def test_a_verdict_is_tried_again_and_stands_for_longer_each_time():
    verdicts = Verdicts()
    verdicts.overflowed(A)
    assert tries(verdicts, RETRY + 1) == [RETRY]
    verdicts.overflowed(A)
    assert tries(verdicts, 2 * RETRY + 1) == [2 * RETRY]


def test_a_try_that_is_finite_takes_the_verdict_back_but_not_its_history():
    verdicts = Verdicts()
    verdicts.overflowed(A)
    verdicts.held(A)
    assert verdicts.of(A) == verdicts.of_batch(A) == "unknown"
    verdicts.overflowed(A)
    assert tries(verdicts, 2 * RETRY + 1) == [2 * RETRY]


def test_an_operator_takes_back_all_of_it():
    verdicts = Verdicts()
    verdicts.overflowed(A)
    verdicts.forget(A)
    assert verdicts.of(A) == "unknown"
    verdicts.overflowed(A)
    assert tries(verdicts, RETRY + 1) == [RETRY]


def test_verdicts_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(module, "KNOWN", 2)
    verdicts = Verdicts()
    for name in "abc":
        verdicts.overflowed(checkpoint(name))
    assert [verdicts.of(checkpoint(name)) for name in "abc"] == ["unknown", "overflows", "overflows"]
