import json
from dataclasses import asdict
from itertools import pairwise

import pytest

from app.engine.engine import LOAD_SECONDS
from deploy.routing import (
    DEFAULT,
    NOTHING,
    SILENT_SECONDS,
    Book,
    Report,
    Resident,
    State,
    load_seconds,
    order,
    replicas_wanted,
    report_of,
)

LOAD = 0.5
SIZE = 100


def resident(name, *more, nbytes=SIZE):
    return Resident((name, *more), name.encode().hex().ljust(64, "0"), nbytes)


def report(*names, number=1, room=10 * SIZE, wait=0.0, load=LOAD, ready=True):
    return Report(number, tuple(resident(name) for name in names), room, wait, load, ready)


def state(name, *models, **changes):
    known = {key: changes.pop(key) for key in ("age", "sent", "pending") if key in changes}
    return State(name, report(*models, **changes), **known)


def test_the_replica_that_holds_the_model_is_first():
    assert order("a", [state("1", "b"), state("2", "a"), state("3")])[0] == "2"


def test_a_hot_model_spreads_once_waiting_costs_more_than_a_load():
    other = state("2", "b")
    assert order("a", [state("1", "a", wait=LOAD - 0.1), other])[0] == "1"
    assert order("a", [state("1", "a", wait=LOAD + 0.1), other])[0] == "2"


def test_of_two_holders_the_less_busy_one_is_first():
    assert order("a", [state("1", "a", wait=0.2), state("2", "a", wait=0.1)])[0] == "2"


def test_a_load_that_evicts_another_model_counts_twice():
    full = state("1", "b", room=SIZE - 1)
    holder = state("3", "a", wait=1.5 * LOAD)
    assert order("a", [full, holder])[0] == "3"
    assert order("a", [state("1", "b", room=SIZE), holder])[0] == "1"


def test_a_cold_model_goes_where_fewer_are():
    assert order("c", [state("1", "a", "b"), state("2", "a")])[0] == "2"
    assert order("c", [state("1", "a", sent=frozenset({"a"})), state("2", "a", sent=frozenset({"d"}))])[0] == "1"


def test_equal_replicas_have_an_order_of_the_model_s_own():
    names = [str(number) for number in range(8)]
    orders = {model: order(model, [state(name) for name in names]) for model in "abcdefgh"}
    assert len({first for first, *_ in orders.values()}) > 2
    for model, found in orders.items():
        assert order(model, [state(name) for name in reversed(names)]) == found
        fewer = [name for name in found if name != found[0]]
        assert order(model, [state(name) for name in fewer]) == fewer  # the others keep their places


def test_a_model_is_known_by_every_name_its_hash_and_as_the_default():
    held = resident("a", "copy of a", DEFAULT)
    for name in ("a", "copy of a", DEFAULT, held.sha256, held.sha256[:8].upper()):
        assert held.is_called(name)
    for name in ("b", held.sha256[:7], "A"):
        assert not held.is_called(name)


def test_a_request_without_a_model_goes_where_least_waits():
    assert order(None, [state("1", "a", wait=0.2), state("2", wait=0.1, room=0)])[0] == "2"


def test_a_report_s_queue_is_worked_off_as_it_ages():
    assert state("1", wait=2.0, age=0.5).wait == 1.5
    assert state("1", wait=2.0, age=3.0).wait == 0
    assert state("1", wait=2.0, age=0.5, pending=1.75).wait == 1.75


@pytest.mark.parametrize("doubt", [{"age": SILENT_SECONDS + 1}, {"ready": False}])
def test_one_that_reports_no_more_or_is_not_ready_is_passed_by_while_there_are_others(doubt):
    doubtful = state("1", "a", **doubt)
    assert order("a", [doubtful, state("2", wait=10.0)]) == ["2"]
    assert order("a", [doubtful]) == ["1"]


def test_nobody_is_no_choice():
    assert order("a", []) == []


# ------------------------------------------------------------------------------------------- a replica that is new here


def new(name, **known):
    return State(name, NOTHING, **known)


def test_one_that_has_told_nothing_is_empty_and_idle():
    assert order("a", [state("1", "a"), new("2")])[0] == "1"  # a model that is elsewhere stays there
    assert order("a", [state("1", "a", wait=LOAD + 0.1), new("2")])[0] == "2"  # until waiting costs more
    assert order("c", [state("1", "a"), new("2")])[0] == "2"  # a cold one comes here
    assert order(None, [state("1", "a", wait=0.1), new("2")])[0] == "2"
    assert order("a", [new("1"), new("2")]) == order("a", [new("2"), new("1")])
    silent = new("2", age=SILENT_SECONDS + 1)
    assert order("c", [state("1", "a", wait=10.0), silent]) == ["1"]


def test_a_burst_does_not_drown_it():
    book, sent = Book(), []
    for _ in range(8):
        states = [book.state("1", report("a", wait=1.2), 0.0), book.state("2", NOTHING, 0.0)]
        sent.append(order("a", states)[0])
        book.sent(sent[-1], "a", 0.0)
    assert 2 <= sent.count("2") <= 6


def test_loads_are_taken_to_take_what_they_take_most_replicas():
    assert load_seconds([]) == load_seconds([None, None]) == LOAD_SECONDS
    assert load_seconds([None, 0.1, 0.2, 30.0]) == 0.2
    slow = state("1", load=30.0)  # of one, on a bad day
    busy = [state(name, wait=0.3, load=0.1) for name in ("2", "3")]
    assert order("a", [slow, *busy])[0] == "1"  # or it would never tell another number
    untold = state("1", load=None)
    assert order("a", [untold, state("2", "a", wait=0.05, load=0.1)])[0] == "2"
    assert order("a", [untold, state("2", "a", wait=0.2, load=0.1)])[0] == "1"


def test_its_model_is_believed_there_until_its_second_report():
    book = Book()
    book.state("1", NOTHING, 0.0)
    book.sent("1", "a", now=0.0)
    book.ended("1", "a", NOTHING, now=1.0)
    assert book.state("1", NOTHING, 1.0).holds("a")
    assert book.state("1", report(number=7), 1.1).holds("a")  # the first to come here; it may be older than that end
    assert book.state("1", report(number=8), 1.4).holds("a")
    assert not book.state("1", report(number=9), 1.6).holds("a")


def test_a_report_comes_as_it_went():
    told = report("a", "b", load=None, ready=False)
    assert report_of(asdict(told)) == told
    listed = json.loads(json.dumps(asdict(told)))
    assert report_of(listed | {"ready": True}).residents[0].is_called("a")


@pytest.mark.parametrize("told", [{}, {"residents": []}, asdict(report("a")) | {"mood": 1}, {"residents": [{"x": 1}]}])
def test_what_another_version_tells_is_nothing(told):
    assert report_of(told) is NOTHING


# ---------------------------------------------------------------------------------------------------------------- book


def test_a_report_s_age_begins_when_it_comes():
    book = Book()
    book.came("1", 4, now=1.0)
    book.came("1", 4, now=2.0)
    assert book.state("1", report(number=4), 5.0).age == 4.0
    assert book.state("1", report(number=5), 6.0).age == 0.0


def test_what_was_sent_is_there_before_a_report_says_so():
    book = Book()
    book.sent("1", "a", now=0.0)
    assert book.state("1", report(), 0.0).holds("a")
    assert not book.state("2", report(), 0.0).holds("a")


def test_a_model_is_believed_there_until_a_report_made_after_its_last_request():
    book, before = Book(), report(number=4)
    book.sent("1", "a", now=0.0)
    book.ended("1", "a", before, now=1.0)
    assert book.state("1", before, 1.0).holds("a")
    assert book.state("1", report(number=5), 1.0).holds("a")  # may have been made before the load was done
    assert not book.state("1", report(number=6), 1.0).holds("a")


def test_a_model_with_a_request_is_believed_there_whatever_reports_say():
    book = Book()
    book.sent("1", "a", now=0.0)
    assert all(book.state("1", report(number=number), 0.0).holds("a") for number in range(10))


def test_what_is_pending_is_reckoned_with_the_replica_s_own_pace():
    book = Book()
    for _ in range(3):  # at once; an answer every two seconds
        book.sent("1", "a", now=0.0)
    for end in (2.0, 4.0):
        book.ended("1", "a", None, now=end)
    assert book.state("1", report(), 4.0).pending == pytest.approx(2.0)
    book.ended("1", "a", None, now=6.0)
    assert book.state("1", report(), 9.0).pending == 0
    book.sent("1", "a", now=100.0)  # idle time is no pace
    book.sent("1", "a", now=100.0)
    assert book.state("1", report(), 100.0).pending == pytest.approx(4.0)


def test_before_the_first_answer_a_request_is_taken_to_cost_as_much_as_a_load():
    book = Book()
    for _ in range(3):
        book.sent("1", "a", now=0.0)
    assert book.state("1", report(load=0.25), 0.0).pending == 0.75


def test_a_batch_s_answers_share_its_time():
    book = Book()
    for _ in range(8):
        book.sent("1", "a", now=0.0)
    for _ in range(8):
        book.ended("1", "a", None, now=1.0)
    book.sent("1", "a", now=2.0)
    assert 0 < book.state("1", report(), 2.0).pending < 0.2


def test_a_burst_of_cold_models_is_dealt_out():
    book, names = Book(), ["1", "2"]
    for model in "abcdef":
        best = order(model, [book.state(name, report(number=0), 0.0) for name in names])[0]
        book.sent(best, model, 0.0)
    assert [book.state(name, report(number=0), 0.0).models for name in names] == [3, 3]


def test_an_end_that_was_not_begun_changes_nothing():
    book = Book()
    book.ended("1", "a", None, now=1.0)
    book.sent("1", "b", now=1.0)
    book.ended("1", "a", None, now=2.0)
    assert book.state("1", report(), 2.0).sent == {"b"}


def test_requests_without_a_model_count_as_work_and_as_no_model():
    book = Book()
    book.sent("1", None, now=0.0)
    book.ended("1", None, report(), now=1.0)
    book.sent("1", None, now=1.0)
    now = book.state("1", report(), 1.0)
    assert now.pending == 1.0
    assert not now.sent


def test_a_replica_that_is_gone_is_forgotten():
    book = Book()
    book.sent("1", "a", now=0.0)
    book.keep(["2"])
    assert not book.state("1", report(), 0.0).sent


# ------------------------------------------------------------------------------------------------------------- scaling


def test_as_many_replicas_as_are_busy_with_room_for_bursts():
    assert replicas_wanted([], [], 5.0) == 0
    assert replicas_wanted([0.0] * 4, [0.8, 0.8, 0.8, 0.8], 5.0) == 4
    assert replicas_wanted([0.0] * 4, [0.4, 0.4, 0.4, 0.4], 5.0) == 2
    assert replicas_wanted([0.1], [1.0], 5.0) == 2


def test_queued_seconds_want_replicas_in_proportion():
    wanted = [replicas_wanted([seconds], [1.0], 5.0) for seconds in (0, 5, 10, 20, 40)]
    assert wanted == [2, 3, 4, 6, 10]
    assert all(fewer <= more for fewer, more in pairwise(wanted))
