import logging

import pytest
from prometheus_client import CollectorRegistry

from app.main import build_engine
from app.settings import Settings
from app.startup import doubts, report, served, size
from tests.service import serving
from tests.store.weights import state_of, write


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a" / "VAE" / "a.safetensors", state_of("taesd"))
    (tmp_path / "a" / "VAE" / "broken.pt").write_text("no")
    write(tmp_path / "b" / "VAE" / "a.safetensors", state_of("taesd", 1))
    return tmp_path


async def test_the_log_says_what_is_served_and_what_is_hardly_meant(folder, monkeypatch, caplog):
    monkeypatch.setenv("LATENTD_MODEL", "a")
    caplog.set_level(logging.INFO, "app.startup")
    folders = f"{folder / 'a'}:{folder / 'b'}"
    async with serving(folders, default_model="sdxl", max_body_bytes="64KiB", api_keys="k") as service:
        answer = await service.get("/healthz/ready")
        assert (answer.status_code, answer.json()["default_model"]) == (200, False)
        write(folder / "b" / "VAE" / "sdxl.safetensors", state_of("taesd", 2))
        await service.engine.resolve("sdxl")
        assert (await service.get("/healthz/ready")).json()["default_model"] is True
    (line, *warnings) = [
        (record.levelname, record.message) for record in caplog.records if record.name == "app.startup"
    ]
    assert line[0] == "INFO"
    for part in (
        f"{folder / 'a'}, {folder / 'b'}: 3 models, 1 unusable; device cpu; precision auto",
        "64KiB",
        "keys on",
    ):
        assert part in line[1]
    assert warnings == [
        ("WARNING", "LATENTD_MODEL is no setting; LATENTD_MODELS is one"),
        ("WARNING", "LATENTD_DEFAULT_MODEL=sdxl: no such model"),
    ]


async def test_nothing_is_said_of_what_is_well(folder, caplog):
    async with serving(folder / "b", default_model="a"):
        pass
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_before_the_first_scan_nothing_is_held_against_the_folder(tmp_path):
    settings = Settings(models=tmp_path, device="cpu", default_model="a")
    engine = build_engine(settings, CollectorRegistry())
    assert f"{tmp_path}: 0 models so far" in served(settings, engine)
    assert list(doubts(settings, engine)) == ["LATENTD_DEFAULT_MODEL=a: no such model so far"]
    report(settings, engine, {})


async def test_an_empty_folder_is_told(tmp_path):
    async with serving(tmp_path) as service:
        told = list(doubts(Settings(models=tmp_path), service.engine))
    assert told == [f"no usable model in {tmp_path}"]


def test_sizes_as_settings_take_them():
    assert [size(count) for count in (2 << 30, 3 << 20, 1536, 1000, 0)] == ["2GiB", "3MiB", "1536B", "1000B", "0B"]
