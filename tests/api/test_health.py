import asyncio
import shutil
import subprocess

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.api.door.bounds import PROBES
from app.main import create_app
from app.settings import Settings
from tests.service import SIDE, occupied, picture, refused, serving

LIVE = ("/healthz/live", "/health", "/livez", "/v2/health/live")
READY = ("/healthz/ready", "/readyz", "/v2/health/ready")


@pytest.mark.parametrize("path", [*LIVE, *READY, "/healthz/startup"])
async def test_green(models, path):
    async with serving(models) as service:
        answer = await service.get(path)
        assert (answer.status_code, answer.json()["status"]) == (200, "ok")


async def test_before_the_first_scan_it_lives_and_is_not_ready(models):
    app = create_app(Settings(models=models, device="cpu"))  # not started
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        assert {(await client.get(path)).status_code for path in LIVE} == {200}
        assert {(await client.get(path)).status_code for path in (*READY, "/healthz/startup")} == {503}


async def test_while_draining_it_lives_and_refuses_work(models):
    async with serving(models, default_model="kl") as service:
        service.engine.draining = True
        assert {(await service.get(path)).status_code for path in LIVE} == {200}
        assert {(await service.get(path)).status_code for path in READY} == {503}
        answer = await service.post("/encode", content=picture())
        refused(answer, 503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["retryable"] is True
        assert service.count("vae_rejected_total", reason="draining") == 1
        assert "vae_draining 1.0" in (await service.get("/metrics")).text


async def test_a_lost_device_turns_both_red(models):
    async with serving(models) as service:
        service.engine.workers[0].thread.lost = "an illegal memory access"
        for path in (*LIVE, *READY):
            answer = await service.get(path)
            assert (answer.status_code, answer.json()["status"]) == (503, "failing")
        assert "illegal" in (await service.get("/healthz/live")).json()["lost"]


async def test_a_full_queue_touches_neither(models):
    async with serving(models, default_model="kl", queue_size=1) as service:
        with occupied(service.engine):
            waiting = [asyncio.ensure_future(service.post("/encode", content=picture())) for _ in range(6)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answer = next(task.result() for task in waiting if task.done())
            refused(answer, 429, "overloaded")
            assert {(await service.get(path)).status_code for path in (*LIVE, *READY)} == {200}
        assert {(await task).status_code for task in waiting} == {200, 429}


async def test_the_metrics_say_what_was_done(models):
    async with serving(models, default_model="kl") as service:
        await service.post("/encode", content=picture())
        await service.post("/encode", content=b"no")
        await service.post("/encode?model=nobody", content=picture())
        await service.get("/models")
        count = service.count
        assert count("vae_requests_total", op="encode", model="kl", status="200") == 1
        assert count("vae_requests_total", op="encode", model="kl", status="415") == 1
        assert count("vae_requests_total", op="encode", model="", status="404") == 1  # no label from a request
        assert count("vae_request_duration_seconds_count", op="encode", model="kl") == 2
        for stage in ("read", "queue", "load", "compute", "write"):
            assert count("vae_stage_duration_seconds_count", op="encode", stage=stage) == 1
        assert count("vae_batch_items_total") == 1
        assert count("vae_model_loads_total", result="ok") == 1
        answer = await service.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        for name in (
            "vae_queue_pixels 0.0",
            "vae_requests_in_flight 0.0",
            "vae_draining 0.0",
            'vae_worker_up{device="cpu"} 1.0',
            'vae_model_resident{device="cpu",dtype="fp32",model="kl"} 1.0',
            "vae_build_info{",
        ):
            assert name in answer.text


def complaints(text: str) -> str:
    """What promtool says of metrics; nothing where it is not installed."""
    if shutil.which("promtool") is None:
        return ""
    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return checked.stdout + checked.stderr


async def test_the_metrics_keep_the_rules_of_prometheus(models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    (tmp_path / "VAE" / "broken.safetensors").write_bytes(b"no weights")
    async with serving(tmp_path, default_model="kl") as service:
        encoded = await service.post("/encode", content=picture())
        await service.post("/decode", content=encoded.content)
        text = (await service.get("/metrics")).text
    assert "_created" not in text
    assert "gpu" not in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in families.values())
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds"} <= set(families)
    for line in (
        'vae_models{state="usable"} 2.0',
        'vae_models{state="error"} 1.0',
        'vae_device_memory_bytes{device="cpu",kind="total"}',
        f'vae_pixels_total{{device="cpu",op="encode"}} {SIDE * SIDE:.1f}',
        f'vae_pixels_total{{device="cpu",op="decode"}} {SIDE * SIDE:.1f}',
        'vae_stage_duration_seconds_bucket{le="0.0005",op="decode",stage="write"}',
        'vae_stage_duration_seconds_bucket{le="600.0",op="decode",stage="compute"}',
    ):
        assert line in text, line
    assert complaints(text) == ""


async def test_health_and_its_guards_need_no_thread(models, monkeypatch):
    """FastAPI runs whatever is no coroutine in a pool of 40 threads, which slow requests can fill."""

    def refuse(*_, **__):
        raise AssertionError("a thread is needed")

    monkeypatch.setattr("fastapi.dependencies.utils.run_in_threadpool", refuse)
    monkeypatch.setattr("fastapi.routing.run_in_threadpool", refuse)
    async with serving(models, default_model="kl", api_keys="a", admin_key="b", metrics_public=False) as service:
        assert {*LIVE, *READY, "/healthz/startup"} == PROBES
        for path in (*PROBES, "/metrics", "/models"):
            assert (await service.get(path, headers={"Authorization": "Bearer a"})).status_code == 200
        answer = await service.post("/models/kl/pin", headers={"Authorization": "Bearer b"})
        assert answer.status_code == 200
