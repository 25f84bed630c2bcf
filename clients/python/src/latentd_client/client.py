"""The blocking shell: does what the calls want done, one step after the other."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from latentd_client import calls
from latentd_client.parts import Parts, endless
from latentd_client.progress import counting
from latentd_client.results import Decoded
from latentd_client.shell import Shell, arguments
from latentd_client.steps import Body, Policy, Send, Step, Steps, Wait, broken

P = ParamSpec("P")
A = TypeVar("A")
T = TypeVar("T")


def _blocking(call: Callable[Concatenate[Policy, P], Steps[T]]) -> Callable[Concatenate["Client", P], T]:
    """A method that goes through with a call."""

    @wraps(call)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(call(self.policy, *args, **kwargs))

    return method


def _many(
    call: Callable[Concatenate[Policy, A, P], Steps[T]],
) -> Callable[Concatenate["Client", Iterable[A], P], Generator[T]]:
    """The same for many items."""

    def method(self: "Client", items: Iterable[A], /, *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
        """The same of each item, `at_once` at a time; results in the items' order.

        Items are taken as there is room for them. The first failure ends it, and nothing more is begun.
        """

        def one(item: A) -> T:
            return self.run(call(self.policy, item, *args, **kwargs))

        return self._in_order(one, items)

    return method


class Client(Shell):
    """The service, for programs that wait. One client may be used from many threads."""

    _http: httpx.Client

    encode = _blocking(calls.encode)
    decode = _blocking(calls.decode)
    models = _blocking(calls.models)
    model = _blocking(calls.model)
    preview = _blocking(calls.preview)
    show = _blocking(calls.show)
    compare = _blocking(calls.compare)
    encode_many = _many(calls.encode)
    decode_many = _many(calls.decode)

    def _connect(self, **how: Any) -> None:
        self._http = httpx.Client(**how)

    def run(self, steps: Steps[T]) -> T:
        """Does the steps of a call, and returns its result."""
        go: Callable[[], Step] = partial(next, steps)
        try:
            while True:
                step = go()
                try:
                    go = partial(steps.send, self._do(step))
                except httpx.RequestError as error:
                    go = partial(steps.throw, broken(error))
        except StopIteration as done:
            result: T = done.value
            return result

    @contextmanager
    def look_on(self, stream: str) -> Iterator[Iterator[Decoded]]:
        """The pictures of a stream as they come: `with client.look_on(name) as pictures`. Raises LatentdError."""
        try:
            look = calls.look(stream)
            with self._http.stream(look.method, look.path, **arguments(look)) as response:
                parts = Parts(response if endless(response) else self._whole(response, look))
                yield (picture for data in response.iter_raw() for picture in parts.feed(data))
        except httpx.RequestError as error:
            raise broken(error) from error

    def _do(self, step: Step) -> Any:
        if isinstance(step, Send):
            with self._http.stream(step.method, step.path, **arguments(step)) as response:
                return self._whole(response, step)
        if isinstance(step, Wait):
            return time.sleep(step.seconds)
        return step.function()

    def _whole(self, response: httpx.Response, send: Send) -> httpx.Response:
        body = Body(response, send)
        for data in response.iter_bytes():
            if not body.feed(data):
                break
        return body.whole()

    def _in_order(self, one: Callable[[A], T], items: Iterable[A]) -> Generator[T]:
        pool = ThreadPoolExecutor(self.at_once, "latentd")
        waiting: deque[Future[T]] = deque()
        try:
            with counting(self.progress, items) as advance:

                def first() -> T:
                    result = waiting.popleft().result()
                    advance()  # before the caller has it: one that zips does not come back for more
                    return result

                for item in items:
                    if len(waiting) >= 2 * self.at_once:  # one that is slow holds up few of the others
                        yield first()
                    waiting.append(pool.submit(one, item))
                while waiting:
                    yield first()
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
