"""Which replica a request goes to: a pure choice over what replicas tell of themselves and what was sent to them.

The replica that should come to the request first is chosen, as the engine chooses among its own devices: the seconds
of work before it, plus the load where the model is not there, plus one more where that load evicts another model,
which somebody will want back. A hot model thereby spreads once waiting for it costs more than loading it elsewhere,
and a cold one stays where it is.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil
from statistics import median
from typing import Any

from app.engine.engine import LOAD_SECONDS

DEFAULT = ""
"""Stands for the model of a request that names none; a replica lists it among the names of its default model."""

HEX_DIGITS = 8  # of a sha256, that may stand for a name

SILENT_SECONDS = 3.0
"""A replica that has not reported for so long is passed by: it hangs, or is gone and nobody has noticed yet."""

DECAY = 0.9  # of what earlier answers say of a replica's pace, with each answer

BUSY = 0.8
"""Of replicas' time: what more than that keeps busy is too few, since requests come in bursts."""


@dataclass(frozen=True)
class Resident:
    """A model on a replica's device: all its names, its hash, the bytes of its weights."""

    names: tuple[str, ...]
    sha256: str
    nbytes: int

    def is_called(self, model: str) -> bool:
        """Whether a request for `model`, a name or the first digits of a hash, means this one."""
        return model in self.names or (len(model) >= HEX_DIGITS and self.sha256.startswith(model.lower()))


@dataclass(frozen=True)
class Report:
    """What a replica tells of itself, now and then."""

    number: int  # counts its reports, from 1
    residents: tuple[Resident, ...]
    room: int  # bytes that further weights may take without evicting any
    wait: float  # seconds until all the work that it has admitted should be done
    load: float | None  # seconds that bringing a model to its device takes; None: nothing to go by yet
    ready: bool = True  # else it would refuse, or not come to it


NOTHING = Report(0, (), room=1 << 62, wait=0.0, load=None)
"""Of a replica that has just come: it is empty and idle, as far as anybody knows."""


def report_of(told: Mapping[str, Any]) -> Report:
    """What a replica told, out of plain values; NOTHING where that is nothing, or what another version tells."""
    try:
        return Report(**{**told, "residents": tuple(Resident(**each) for each in told["residents"])})
    except (KeyError, TypeError):
        return NOTHING


def load_seconds(told: Iterable[float | None]) -> float:
    """What a load takes, by what replicas tell.

    Of them all: a replica whose few loads were slow ones would otherwise have no more, and never tell another number.
    """
    return median([seconds for seconds in told if seconds is not None] or [LOAD_SECONDS])


@dataclass(frozen=True)
class State:
    """A replica as a router sees it: its last report, and what has happened since by the router's own book."""

    id: str
    report: Report
    age: float = 0.0  # seconds since the report came
    sent: frozenset[str] = frozenset()  # models of requests that it has, or had when it made the report
    pending: float = 0.0  # seconds that the requests which it has from this router should take

    @property
    def sound(self) -> bool:
        """Whether it answers, as far as can be told."""
        return self.report.ready and self.age <= SILENT_SECONDS

    @property
    def wait(self) -> float:
        """Seconds before a request that comes now: what is left of the reported ones, or what this router sent."""
        return max(self.report.wait - self.age, self.pending)

    def holds(self, model: str) -> bool:
        """Whether the model is there, or on its way."""
        return model in self.sent or self._listed(model)

    @property
    def models(self) -> int:
        """How many it holds."""
        return len(self.report.residents) + sum(not self._listed(model) for model in self.sent)

    def _listed(self, model: str) -> bool:
        return any(resident.is_called(model) for resident in self.report.residents)


def order(model: str | None, states: Sequence[State]) -> list[str]:
    """The ids of the replicas, the best one for a request first; model None: any model, or none, may be meant.

    Those that do not report, or are not ready, are left out where there are others. Of equal ones the one with fewer
    models is better, then the one that comes first in the model's own order (rendezvous hashing): routers that know
    nothing of each other agree.
    """
    states = [state for state in states if state.sound] or states
    size, load = _size(model, states), load_seconds(state.report.load for state in states)

    def cost(state: State) -> tuple[float, int, bytes]:
        return state.wait + _loads(model, size, state) * load, state.models, _draw(model, state.id)

    return [state.id for state in sorted(states, key=cost)]


def _size(model: str | None, states: Sequence[State]) -> int:
    """Bytes of the model's weights, where any replica tells; else 0, which fits everywhere."""
    residents = (resident for state in states for resident in state.report.residents)
    return max((each.nbytes for each in residents if model is not None and each.is_called(model)), default=0)


def _loads(model: str | None, size: int, state: State) -> int:
    """That a request for the model brings about, with the one of a model that it evicts."""
    if model is None or state.holds(model):
        return 0
    return 1 if size <= state.report.room else 2


def _draw(model: str | None, replica: str) -> bytes:
    return blake2b(f"{model} {replica}".encode(), digest_size=8).digest()


@dataclass
class _Account:
    """What a router knows of one replica besides its reports."""

    pending: Counter[str | None] = field(default_factory=Counter)  # requests that it has, by model
    ended: dict[str, int] = field(default_factory=dict)  # models of others, with the number of the report of then
    since: float = 0.0  # when it last gave an answer, or began to have work
    seconds: float = 0.0  # that it was busy, and the answers that it gave in them; both decay
    answers: float = 0.0
    came: tuple[int, float] = (-1, 0.0)  # the number of its last report, and when that came


class Book:
    """What one router has sent where: reports are always a little old, and bursts are shorter than that."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def sent(self, replica: str, model: str | None, now: float) -> None:
        """A request goes to a replica."""
        account = self._accounts.setdefault(replica, _Account())
        if not account.pending:
            account.since = now
        account.pending[model] += 1

    def ended(self, replica: str, model: str | None, report: Report | None, now: float) -> None:
        """It has its end there, whichever; `report` is the replica's last one."""
        account = self._accounts.get(replica)
        if account is None or not account.pending[model]:
            return
        account.pending[model] -= 1
        account.pending = +account.pending
        account.seconds = DECAY * account.seconds + now - account.since
        account.answers = DECAY * account.answers + 1
        account.since = now
        if report is not None and model is not None:
            account.ended[model] = report.number

    def came(self, replica: str, number: int, now: float) -> None:
        """The replica's last report, as far as it has come, is this one; said again, it has grown older."""
        account = self._accounts.setdefault(replica, _Account())
        if number != account.came[0]:
            if account.came[0] == NOTHING.number:  # which counts nothing
                account.ended = dict.fromkeys(account.ended, number)
            account.came = number, now

    def state(self, replica: str, report: Report, now: float) -> State:
        """The replica as it should be now."""
        self.came(replica, report.number, now)
        account = self._accounts[replica]
        # The next report but one was certainly made after the request's end: what it does not list is not there.
        account.ended = {model: at for model, at in account.ended.items() if report.number < at + 2}
        guess = LOAD_SECONDS if report.load is None else report.load  # of the right order
        pace = account.seconds / account.answers if account.answers else guess
        sent = frozenset(model for model in (*account.pending, *account.ended) if model is not None)
        return State(replica, report, now - account.came[1], sent, account.pending.total() * pace)

    def keep(self, replicas: Iterable[str]) -> None:
        """Forgets all others."""
        self._accounts = {each: self._accounts[each] for each in replicas if each in self._accounts}


def replicas_wanted(waits: Iterable[float], busy: Iterable[float], seconds: float) -> int:
    """How many replicas the work needs: all that are busy, with room for bursts, and more for what is queued.

    `waits` are the replicas' queued seconds, `busy` the share of its time that each had work (0 to 1); the work queued
    should be done within `seconds`.
    """
    return ceil(round(sum(busy) / BUSY + sum(waits) / seconds, 6))
