import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from app.api.keys import Keys
from app.errors import Overloaded
from deploy.ingress import TRIES, Door, ReplicaDied, Replicas, create_ingress, model_of
from deploy.replica import Answer, Call
from deploy.routing import DEFAULT

OK = Answer(200, [(b"content-type", b"image/png"), (b"x-model", b"kl"), (b"content-length", b"7")], b"picture")


@dataclass
class Fake:
    """Replicas that answer with what they are given, one after the other; an exception is raised."""

    answers: list = field(default_factory=lambda: [OK])
    calls: list[Call] = field(default_factory=list)
    cancelled: int = 0

    async def answer(self, call):
        self.calls.append(call)
        found = self.answers[min(len(self.calls), len(self.answers)) - 1]
        if isinstance(found, Exception):
            raise found
        if found is None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return found

    async def metrics(self, seconds):
        text = '# HELP vae_x_total X.\n# TYPE vae_x_total counter\nvae_x_total{op="decode"} %d\n'
        return [("one", text % 1), ("two", text % 2)]


@asynccontextmanager
async def door(fake, **options):
    limits = {"body_bytes": 1000, "buffer_bytes": 2000, "api_keys": Keys(), "admin_keys": Keys(), **options}
    app = create_ingress(Replicas(fake.answer, fake.metrics), Door(**limits))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        yield client


async def test_a_request_reaches_a_replica_whole_and_its_answer_the_client():
    fake = Fake()
    async with door(fake) as client:
        answer = await client.post("/decode?model=kl&latents=raw", content=b"latent", headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.content, answer.headers["x-model"]) == (200, b"picture", "kl")
    assert answer.headers.get_list("content-length") == ["7"]
    assert answer.headers.get_list("x-request-id") == ["mine"]
    [call] = fake.calls
    assert (call.method, call.path, call.query) == ("POST", "/decode", b"model=kl&latents=raw")
    assert (call.body, call.model) == (b"latent", "kl")
    assert [value for name, value in call.headers if name == b"x-request-id"] == [b"mine"]


@pytest.mark.parametrize(
    ("path", "query", "model"),
    [
        ("/decode", b"model=a%2Fb&x=1", "a/b"),
        ("/decode", b"model=a+b", "a b"),
        ("/encode", b"", DEFAULT),
        ("/remote/a/b/decode", b"", "a/b"),
        ("/remote/decode", b"", None),
        ("/compare", b"model=a", None),
        ("/models", b"", None),
        ("/decode", b"model=%ff", "\N{REPLACEMENT CHARACTER}"),
        ("/decode", b"\xff&model=a", "a"),
    ],
)
def test_the_model_is_read_off_the_request(path, query, model):
    assert model_of(path, query) == model


async def test_a_request_whose_replica_dies_has_another_one():
    fake = Fake([ReplicaDied("killed"), OK])
    async with door(fake) as client:
        answer = await client.post("/decode", content=b"latent")
    assert answer.status_code == 200
    assert [call.body for call in fake.calls] == [b"latent"] * 2


async def test_what_kills_every_replica_is_not_tried_for_ever():
    fake = Fake([ReplicaDied("killed")])
    async with door(fake) as client:
        answer = await client.post("/decode", content=b"latent")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert len(fake.calls) == TRIES


async def test_a_replica_s_refusal_is_the_answer_and_nobody_else_is_asked():
    shed = Answer(429, [(b"retry-after", b"7"), (b"content-type", b"application/problem+json")], b"{}")
    fake = Fake([shed])
    async with door(fake) as client:
        answer = await client.post("/decode", content=b"latent")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert len(fake.calls) == 1


async def test_too_many_that_wait_for_a_replica_are_told_to_come_back():
    async with door(Fake([Overloaded("full", retry_after=4.2)])) as client:
        answer = await client.post("/decode", content=b"latent")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")


async def test_the_deadline_holds_over_all_tries_and_each_is_told_what_is_left():
    fake = Fake([ReplicaDied("killed"), None])
    async with door(fake) as client:
        answer = await client.post("/decode", content=b"latent", headers={"X-Request-Timeout-Ms": "200"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    assert fake.cancelled == 1
    told = [int(value) for call in fake.calls for name, value in call.headers if name == b"x-request-timeout-ms"]
    assert len(told) == 2
    assert 0 < told[1] <= told[0] <= 200


async def test_a_client_that_goes_away_cancels_its_call():
    fake, gone = Fake([None]), asyncio.Event()
    app = create_ingress(Replicas(fake.answer, fake.metrics), Door(1000, 2000, Keys(), Keys()))
    messages = [{"type": "http.request", "body": b"latent"}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/decode", "query_string": b"", "headers": [], "state": {}}
    serving = asyncio.ensure_future(app(scope, receive, send))
    while not fake.calls:  # noqa: ASYNC110  the fake tells nobody
        await asyncio.sleep(0.01)
    gone.set()
    await serving
    assert fake.cancelled == 1
    assert sent[0]["status"] == 499


async def test_bodies_are_bounded_before_a_replica_hears_of_them():
    fake = Fake()
    async with door(fake) as client:
        assert (await client.post("/decode", content=b"x" * 1001)).status_code == 413
    assert not fake.calls


async def test_a_body_without_a_key_is_not_read():
    fake, keys = Fake(), Keys({"secret"})
    async with door(fake, api_keys=keys) as client:
        assert (await client.post("/decode", content=b"x" * 1001)).status_code == 401
        wrong = await client.post("/decode", content=b"x", headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 403
        assert not fake.calls
        good = await client.post("/decode", content=b"x", headers={"Authorization": "Bearer secret"})
        assert good.status_code == 200
        assert (await client.get("/")).status_code == 200  # what needs no key is a replica's to say


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("POST", "/models/kl/load"), ("PUT", "/models/kl"), ("DELETE", "/models/kl"), ("POST", "/")],
        *[(method, "/preview/stream") for method in ("GET", "POST", "HEAD")],
    ],
)
async def test_what_is_one_replicas_alone_is_refused(method, path):
    fake = Fake()
    async with door(fake) as client:
        answer = await client.request(method, path)
    assert answer.status_code == 405
    assert method == "HEAD" or answer.json()["code"] == "method_not_allowed"
    assert not fake.calls


async def test_metrics_of_all_processes_are_one_text():
    async with door(Fake()) as client:
        await client.post("/decode", content=b"latent")
        text = (await client.get("/metrics")).text
    assert text.count("# TYPE vae_x_total counter") == 1
    assert 'vae_x_total{op="decode",replica="one"} 1.0' in text
    assert 'vae_x_total{op="decode",replica="two"} 2.0' in text
    assert 'vae_requests_total{model="",op="decode",replica="ingress",status="200"} 1.0' in text


async def test_metrics_need_a_key_where_they_are_not_public():
    keys = Keys({"secret"})
    async with door(Fake(), api_keys=keys, metrics_public=False) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"Authorization": "Bearer secret"})).status_code == 200


@pytest.mark.parametrize("answers", [[ReplicaDied("killed")], [Answer(503, (), b"{}")], [None]])
async def test_ready_is_red_where_no_replica_is_and_live_is_not(answers, monkeypatch):
    monkeypatch.setattr("deploy.ingress.PROBE_SECONDS", 0.05)
    async with door(Fake(answers)) as client:
        assert (await client.get("/healthz/ready")).status_code == 503
        assert (await client.get("/healthz/live")).status_code == 200


async def test_ready_is_what_a_replica_says():
    fake = Fake()
    async with door(fake) as client:
        assert (await client.get("/readyz")).json() == {"status": "ok"}
    assert fake.calls[0].path == "/healthz/ready"


async def test_a_proxys_prefix_and_pages_of_other_origins_are_the_door_s_business():
    page, fake = {"Origin": "https://ui.example"}, Fake()
    async with door(fake, origins=("https://ui.example",), root_path="/vae") as client:
        answer = await client.post("/vae/decode?model=kl", content=b"latent", headers=page)
        asked = await client.options("/vae/decode", headers=page | {"Access-Control-Request-Method": "POST"})
    assert (answer.status_code, fake.calls[0].path, fake.calls[0].model) == (200, "/decode", "kl")
    assert answer.headers.get_list("access-control-allow-origin") == ["https://ui.example"]
    assert asked.status_code == 200
