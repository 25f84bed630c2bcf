import logging

import pytest

from app.api import keys as module
from app.api.keys import MOST_BYTES, Keys, read_keys
from app.main import create_app
from app.settings import InvalidSetting, Settings
from tests.service import refused, serving


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b"a\n", {"a"}),
        (b"a,b\r\n c \n\n", {"a", "b", "c"}),
        ("\ufeffschlüssel".encode(), {"schlüssel"}),
        (b"with blanks inside", {"with blanks inside"}),
    ],
)
def test_a_file_has_a_key_a_line(tmp_path, content, keys):
    (tmp_path / "keys").write_bytes(content)
    assert read_keys(tmp_path / "keys") == keys


@pytest.mark.parametrize("content", [b"", b" \n,\n", b"\xff\xfe", b"a" * (MOST_BYTES + 1)])
def test_what_has_no_keys_is_refused(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=r"keys|utf-8"):
        read_keys(tmp_path / "keys")


async def test_keys_rotate_while_the_service_runs(models, tmp_path, caplog):
    api, admin = tmp_path / "api", tmp_path / "admin"
    api.write_text("old\n")
    admin.write_text("root\n")
    async with serving(models, api_keys_file=api, admin_key_file=admin) as service:

        async def status(key: str, path: str = "/models") -> int:
            return (await service.get(path, headers={"Authorization": f"Bearer {key}"})).status_code

        async def pins(key: str) -> int:
            return (await service.post("/models/kl/pin", headers={"Authorization": f"Bearer {key}"})).status_code

        assert [await status(key) for key in ("old", "new", "root")] == [200, 403, 200]
        api.write_text("old\nnew\n")  # both, until every client has the new one
        assert [await status(key) for key in ("old", "new")] == [200, 200]
        caplog.set_level(logging.INFO, "app.api")
        api.write_text("new\n")
        assert [await status(key) for key in ("old", "new")] == [403, 200]
        assert [await pins(key) for key in ("root", "new", "toor")] == [200, 403, 403]
        admin.write_text("toor")
        assert [await pins(key) for key in ("root", "toor")] == [403, 200]
        refused(await service.get("/models"), 401, "unauthorized")
    said = [record.getMessage() for record in caplog.records if record.name == "app.api"]
    assert said == [f"the keys of {api} have changed: 1 now", f"the keys of {admin} have changed: 1 now"]


@pytest.mark.parametrize("broken", ["", "\n", None])
async def test_a_file_that_breaks_leaves_the_keys_and_is_told_once(models, tmp_path, caplog, broken):
    file = tmp_path / "keys"
    file.write_text("a")
    async with serving(models, api_keys_file=file) as service:
        file.unlink() if broken is None else file.write_text(broken)
        for _ in range(3):
            refused(await service.get("/models"), 401, "unauthorized")
            assert (await service.get("/models", headers={"Authorization": "Bearer a"})).status_code == 200
        assert len([record for record in caplog.records if "stay as they were" in record.getMessage()]) == 1
        file.write_text("b")
        assert (await service.get("/models", headers={"Authorization": "Bearer b"})).status_code == 200


async def test_a_file_is_read_no_more_often_than_once_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 1000.0)
    (tmp_path / "keys").write_text("a")
    keys = Keys(file=tmp_path / "keys")
    (tmp_path / "keys").write_text("b")
    assert await keys.current() == {"a"}


@pytest.mark.parametrize("name", ["api_keys", "admin_key"])
def test_a_file_that_is_not_there_or_one_too_many_ends_the_start(models, tmp_path, name):
    file = tmp_path / "keys"
    for content in (None, ""):
        if content is not None:
            file.write_text(content)
        with pytest.raises(InvalidSetting, match=rf"^{name}_file: .*{file}"):
            create_app(Settings(models=models, device="cpu", **{f"{name}_file": file}))
    file.write_text("a")
    with pytest.raises(InvalidSetting, match=rf"^{name}_file: .*both"):
        create_app(Settings(models=models, device="cpu", **{name: "b", f"{name}_file": file}))


async def test_a_service_in_this_process_needs_no_keys(models, tmp_path):
    from app.tools.service import connect

    settings = Settings(models=models, device="cpu", api_keys_file=tmp_path / "no", admin_key_file=tmp_path / "no")
    async with connect(None, None, settings) as client:
        assert (await client.get("/models")).status_code == 200
