import asyncio
import time

import pytest

from app.settings import Settings
from app.store.names import PREFIX
from app.store.store import ModelStore
from deploy.replica import Call, Service
from deploy.routing import DEFAULT, HEX_DIGITS
from tests.service import latent, npy, occupied, until


@pytest.fixture
async def service(models):
    async with Service(Settings(models=(models,), device="cpu", default_model="kl")) as service:
        yield service


def decode(query=b"model=kl", **changes):
    return Call("POST", "/decode", query, [(b"x-request-id", b"mine")], npy(latent(**changes)))


async def test_a_call_is_answered_as_over_http(service):
    answer = await service.answer(decode())
    headers = dict(answer.headers)
    assert (answer.status, headers[b"x-model"], headers[b"x-request-id"]) == (200, b"kl", b"mine")
    assert answer.body.startswith(b"\x89PNG")
    refused = await service.answer(decode(b"model=nobody"))
    assert refused.status == 404
    assert dict(refused.headers)[b"content-type"] == b"application/problem+json"


async def test_a_cancelled_call_gives_its_work_up(service):
    with occupied(service.engine):
        calls = [asyncio.ensure_future(service.answer(decode())) for _ in range(3)]
        await until(lambda: service.engine.open_requests == 3)
        calls[2].cancel()
        await until(lambda: service.engine.open_requests == 2)
    assert [answer.status for answer in await asyncio.gather(*calls[:2])] == [200, 200]


async def test_a_report_tells_what_is_there_and_what_waits(service):
    before = service.report()
    assert (before.residents, before.wait) == ((), 0)
    await service.answer(decode())
    after = service.report()
    [held] = after.residents
    assert {"kl", DEFAULT} <= set(held.names)
    assert held.sha256.startswith(service.engine.meant("kl").sha256)
    assert after.number == before.number + 1
    assert 0 < held.nbytes == before.room - after.room
    with occupied(service.engine):
        queries = (b"model=kl", b"model=kl&latents=raw")  # not one batch: what runs counts until it should be done
        calls = [asyncio.ensure_future(service.answer(decode(query))) for query in queries]
        await until(lambda: service.wait() > 0)
        assert service.report().wait > 0
    await asyncio.gather(*calls)
    assert service.report().number == after.number + 2  # of reports alone


async def test_it_is_ready_as_long_as_it_serves(service):
    assert service.report().ready
    service.engine.draining = True
    assert not service.report().ready
    service.engine.draining = False
    service.engine.workers[0].thread.lost = "in a test"
    assert not service.report().ready
    service.engine.workers[0].thread.lost = None


async def test_it_starts_once_it_knows_its_models_however_long_that_takes(models, monkeypatch):
    monkeypatch.setattr("app.engine.engine.FIRST_SECONDS", 0.0)  # what a service waits before it serves
    read = ModelStore.identify

    def slowly(*given, **more):
        time.sleep(0.3)
        return read(*given, **more)

    monkeypatch.setattr(ModelStore, "identify", slowly)
    async with Service(Settings(models=(models,), device="cpu")) as service:
        assert (await service.answer(decode())).status == 200
        assert service.engine.scanned


async def test_what_a_load_takes_is_told_from_the_second_one_on(service):
    loads = service.engine.metrics.load_seconds.labels("cpu")
    assert service.report().load is None
    loads.observe(60.0)  # it sets torch up
    assert service.report().load is None
    loads.observe(1.0)
    loads.observe(2.0)
    assert service.report().load == 1.5
    loads.observe(0.5)
    assert service.report().load == service.report().load == 1.0


async def test_a_load_is_such_a_one(service):
    await service.answer(decode())
    assert service.report().load is None
    await service.answer(decode(b"model=tiny"))
    assert 0 < service.report().load < 60


async def test_its_metrics_are_the_service_s(service):
    await service.answer(decode())
    assert 'vae_requests_total{model="kl",op="decode",status="200"} 1.0' in service.metrics()


def test_a_hash_is_short_for_the_router_where_it_is_for_the_store():
    assert HEX_DIGITS == PREFIX
