"""The same shell on an event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
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


def _awaited(
    call: Callable[Concatenate[Policy, P], Steps[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """A method that goes through with a call."""

    @wraps(call)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(call(self.policy, *args, **kwargs))

    return method


def _many(
    call: Callable[Concatenate[Policy, A, P], Steps[T]],
) -> Callable[Concatenate["AsyncClient", Iterable[A], P], AsyncGenerator[T]]:
    """The same for many items."""

    def method(self: "AsyncClient", items: Iterable[A], /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T]:
        """The same of each item, `at_once` at a time; results in the items' order.

        Items are taken as there is room for them. The first failure ends it, and so does cancelling: what is in flight
        is hung up.
        """
        room = asyncio.Semaphore(self.at_once)

        async def one(item: A) -> T:
            async with room:
                return await self.run(call(self.policy, item, *args, **kwargs))

        return self._in_order(one, items)

    return method


class AsyncClient(Shell):
    """The service, on an event loop; a task that is cancelled hangs up, and the service drops its work."""

    _http: httpx.AsyncClient

    encode = _awaited(calls.encode)
    decode = _awaited(calls.decode)
    models = _awaited(calls.models)
    model = _awaited(calls.model)
    preview = _awaited(calls.preview)
    show = _awaited(calls.show)
    compare = _awaited(calls.compare)
    encode_many = _many(calls.encode)
    decode_many = _many(calls.decode)

    def _connect(self, **how: Any) -> None:
        self._http = httpx.AsyncClient(**how)

    async def run(self, steps: Steps[T]) -> T:
        """Does the steps of a call, and returns its result."""
        go: Callable[[], Step] = partial(next, steps)
        try:
            while True:
                step = go()
                try:
                    go = partial(steps.send, await self._do(step))
                except httpx.RequestError as error:
                    go = partial(steps.throw, broken(error))
        except StopIteration as done:
            result: T = done.value
            return result

    @asynccontextmanager
    async def look_on(self, stream: str) -> AsyncIterator[AsyncIterator[Decoded]]:
        """The pictures of a stream as they come: `async with client.look_on(name) as pictures`. Raises LatentdError."""
        try:
            look = calls.look(stream)
            async with self._http.stream(look.method, look.path, **arguments(look)) as response:
                parts = Parts(response if endless(response) else await self._whole(response, look))
                yield (picture async for data in response.aiter_raw() for picture in parts.feed(data))
        except httpx.RequestError as error:
            raise broken(error) from error

    async def _do(self, step: Step) -> Any:
        if isinstance(step, Send):
            async with self._http.stream(step.method, step.path, **arguments(step)) as response:
                return await self._whole(response, step)
        if isinstance(step, Wait):
            return await asyncio.sleep(step.seconds)
        return await asyncio.to_thread(step.function)

    async def _whole(self, response: httpx.Response, send: Send) -> httpx.Response:
        body = Body(response, send)
        async for data in response.aiter_bytes():
            if not body.feed(data):
                break
        return body.whole()

    async def _in_order(self, one: Callable[[A], Awaitable[T]], items: Iterable[A]) -> AsyncGenerator[T]:
        waiting: deque[asyncio.Future[T]] = deque()
        try:
            with counting(self.progress, items) as advance:

                async def first() -> T:
                    result = await waiting.popleft()
                    advance()  # before the caller has it: one that zips does not come back for more
                    return result

                for item in items:
                    if len(waiting) >= 2 * self.at_once:  # one that is slow holds up few of the others
                        yield await first()
                    waiting.append(asyncio.ensure_future(one(item)))
                while waiting:
                    yield await first()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
