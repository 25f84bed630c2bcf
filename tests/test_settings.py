from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from app.settings import InvalidSetting, Settings, check_folders, unknown_variables

DEFAULTS = {
    "models": (Path("models"),),
    "default_model": None,
    "default_family": "sd1",
    "device": "auto",
    "cache_bytes": None,
    "memory_limit_bytes": None,
    "precision": "auto",
    "queue_size": 256,
    "queue_pixels": 512 << 20,
    "batch_pixels": None,
    "max_body_bytes": 256 << 20,
    "max_upload_bytes": 8 << 30,
    "buffer_bytes": None,
    "max_connections": 1000,
    "max_pixels": 64 << 20,
    "drain_seconds": 30.0,
    "api_keys": None,
    "api_keys_file": None,
    "admin_key": None,
    "admin_key_file": None,
    "metrics_public": True,
    "cors_origins": None,
    "root_path": "",
    "log_format": "text",
}


def test_these_are_the_settings_and_their_defaults():
    assert Settings().model_dump() == DEFAULTS


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("models", "/srv/models", (Path("/srv/models"),)),
        ("models", "/a/models:/b", (Path("/a/models"), Path("/b"))),
        ("default_model", "sdxl", "sdxl"),
        ("default_family", "sdxl", "sdxl"),
        ("device", "cuda:0, cuda:1", "cuda:0, cuda:1"),
        ("cache_bytes", "1000", 1000),
        ("memory_limit_bytes", "1000", 1000),
        ("precision", "bf16", "bf16"),
        ("queue_size", "2", 2),
        ("queue_pixels", "2", 2),
        ("batch_pixels", "2", 2),
        ("max_body_bytes", "2", 2),
        ("max_upload_bytes", "2", 2),
        ("max_body_bytes", "64KiB", 64 << 10),
        ("memory_limit_bytes", "512 MiB", 512 << 20),
        ("cache_bytes", "1.5gib", 3 << 29),
        ("buffer_bytes", "2", 2),
        ("max_connections", "2", 2),
        ("max_pixels", "2", 2),
        ("drain_seconds", "0.5", 0.5),
        ("api_keys", "a,b", SecretStr("a,b")),
        ("admin_key", "c", SecretStr("c")),
        ("api_keys_file", "/run/keys", Path("/run/keys")),
        ("admin_key_file", "/run/admin", Path("/run/admin")),
        ("metrics_public", "false", False),
        ("cors_origins", "https://a.example, *", "https://a.example, *"),
        ("root_path", "/a/vae", "/a/vae"),
        ("log_format", "json", "json"),
    ],
)
def test_each_has_its_variable(monkeypatch, name, text, value):
    monkeypatch.setenv(f"LATENTD_{name.upper()}", text)
    assert getattr(Settings(), name) == value
    monkeypatch.setenv(f"LATENTD_{name.upper()}", "")  # as a compose file passes on what is unset
    assert getattr(Settings(), name) == DEFAULTS[name]


def test_every_setting_is_in_the_test_above():
    assert set(Settings.model_fields) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue_size", 0),
        ("queue_pixels", -1),
        ("batch_pixels", 0),
        ("max_body_bytes", 0),
        ("max_pixels", 0),
        ("cache_bytes", 0),
        ("cache_bytes", "2GB"),
        ("cache_bytes", "-2GiB"),
        ("cache_bytes", "0.0000001KiB"),
        ("max_body_bytes", "many"),
        ("memory_limit_bytes", "9" * 400),
        ("models", ":"),
        ("models", ()),
        ("memory_limit_bytes", 0),
        ("drain_seconds", -1),
        ("drain_seconds", float("nan")),
        ("drain_seconds", float("inf")),
        ("precision", "fp8"),
        ("cors_origins", "https://a.example/"),
        ("cors_origins", "a.example"),
        ("cors_origins", "null"),
        ("root_path", "vae"),
        ("root_path", "/"),
        ("root_path", "/vae/"),
        ("log_format", "xml"),
        ("metrics_public", "perhaps"),
        ("api_keys", " , "),
        ("device", ","),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("device", "auto,cpu"),
        ("device", "cuda:0,cuda:0"),
        ("device", "cuda,cuda:0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ValidationError) as caught:
        Settings(**{name: value})
    assert [error["loc"] for error in caught.value.errors()] == [(name,)]


def test_lists_are_split_at_commas():
    settings = Settings(device="cuda:0, cuda:1", api_keys=SecretStr(" a,b ,,a"))
    assert settings.devices == ("cuda:0", "cuda:1")
    assert settings.keys == {"a", "b"}
    assert Settings(device="cpu,cpu").devices == ("cpu", "cpu")
    assert Settings().keys == frozenset()


def test_settings_do_not_change_and_do_not_show_their_secrets():
    settings = Settings(api_keys=SecretStr("hush"), admin_key=SecretStr("hush"))
    with pytest.raises(ValidationError, match="frozen"):
        settings.queue_size = 1  # type: ignore[misc]
    assert "hush" not in repr(settings)


def test_folders_must_be_there(tmp_path):
    (tmp_path / "file").touch()
    check_folders(Settings(models=[tmp_path]))
    for name, reason in (("nothing", "does not exist"), ("file", "is no folder")):
        with pytest.raises(InvalidSetting, match=f"^models: .*{name} {reason}$"):
            check_folders(Settings(models=[tmp_path, tmp_path / name]))


def test_variables_that_are_no_settings_are_named():
    known = [f"LATENTD_{name.upper()}" for name in Settings.model_fields]
    others = ["PATH", "LATENTD_URL", "LATENTD_KEY", "latentd_device"]
    kubernetes = ["LATENTD_SERVICE_HOST", "LATENTD_SERVICE_PORT_HTTP", "LATENTD_PORT", "LATENTD_PORT_8000_TCP_ADDR"]
    assert unknown_variables([*known, *others, *kubernetes]) == []
    assert unknown_variables(["LATENTD_MODLES", "LATENTD_XYZZY"]) == [
        "LATENTD_MODLES is no setting; LATENTD_MODELS is one",
        "LATENTD_XYZZY is no setting",
    ]
