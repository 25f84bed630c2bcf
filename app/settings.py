"""Settings: everything an operator decides, read once, from LATENTD_* variables and the command line."""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.engine.batcher import QueueLimits
from app.terms import Precision

_QUEUE = QueueLimits()


PREFIX = "LATENTD_"

OTHERS = re.compile(r"URL|KEY|SERVICE_(HOST|PORT)(_.*)?|PORT(_\d+_(TCP|UDP)(_.*)?)?")
"""LATENTD_* variables that are no settings: the commands', and what Kubernetes tells of a service called latentd."""

ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")

UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


class InvalidSetting(ValueError):
    """A setting that only the machine or the tables of the service can tell to be wrong; the text names it."""


def _bytes(value: object) -> object:
    """`2GiB` as a number of bytes; plain numbers stay."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d{1,18})(?:(\.\d{1,9})?\s*([kmgt]ib))?", value.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise ValueError(f"expected bytes, like 268435456, 512MiB or 2GiB, not {value[:40]!r}")
    digits, fraction, unit = found.groups()
    return int(digits) if unit is None else int(float(digits + (fraction or "")) * UNITS[unit.lower()])


def _folders(value: object) -> object:
    """`a:b` as two paths; a path is one."""
    if isinstance(value, str):
        value = tuple(part for part in value.split(os.pathsep) if part.strip())
    elif isinstance(value, Path):
        value = (value,)
    if not value:
        raise ValueError(f"expected a folder, or several separated by {os.pathsep!r}")
    return value


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_folders)]


class Settings(BaseSettings):
    """Frozen. Byte and pixel limits are plain integers, bytes also `2GiB`. An empty variable is an unset one."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore")

    models: Folders = (Path("models"),)
    default_model: str | None = None
    default_family: str = "sd1"
    device: str = "auto"
    cache_bytes: Bytes | None = None
    memory_limit_bytes: Bytes | None = None
    precision: Precision = "auto"
    queue_size: int = Field(_QUEUE.items, gt=0)
    queue_pixels: int = Field(_QUEUE.pixels, gt=0)
    batch_pixels: int | None = Field(None, gt=0)
    max_body_bytes: Bytes = 256 << 20
    max_upload_bytes: Bytes = 8 << 30
    buffer_bytes: Bytes | None = None
    max_connections: int = Field(1000, gt=0)
    max_pixels: int = Field(8192 * 8192, gt=0)
    drain_seconds: float = Field(30.0, ge=0, le=86_400)
    api_keys: SecretStr | None = None  # comma separated
    api_keys_file: Path | None = None
    admin_key: SecretStr | None = None
    admin_key_file: Path | None = None
    metrics_public: bool = True
    cors_origins: str | None = None  # comma separated
    root_path: str = ""
    log_format: Literal["json", "text"] = "text"

    @property
    def devices(self) -> tuple[str, ...]:
        """`device`, split at its commas."""
        return _parts(self.device)

    @property
    def keys(self) -> frozenset[str]:
        """`api_keys`, split at their commas; none: the service is open."""
        return frozenset(_parts(self.api_keys.get_secret_value())) if self.api_keys else frozenset()

    @property
    def admin_keys(self) -> frozenset[str]:
        """`admin_key`, or nothing."""
        return frozenset({self.admin_key.get_secret_value()}) if self.admin_key else frozenset()

    @property
    def origins(self) -> tuple[str, ...]:
        """`cors_origins`, split at their commas."""
        return _parts(self.cors_origins or "")

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: str | None) -> str | None:
        for origin in _parts(value or ""):
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"expected origins as browsers say them, like https://ui.example, or *; not {origin[:80]}"
                )
        return value

    @field_validator("root_path")
    @classmethod
    def _root_path_is_a_path(cls, value: str) -> str:
        if value and not ROOT_PATH.fullmatch(value):
            raise ValueError(f"expected a path like /vae, without a slash at its end; not {value[:80]!r}")
        return value

    @field_validator("device")
    @classmethod
    def _devices_are_named(cls, value: str) -> str:
        names = _parts(value)
        known = names == ("auto",) or all(re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) for name in names)
        cards = [name.replace("cuda:0", "cuda") for name in names if name != "cpu"]
        if not names or not known or len(set(cards)) < len(cards):
            raise ValueError("expected auto, cpu, or cards like cuda:0,cuda:1")
        return value

    @field_validator("api_keys")
    @classmethod
    def _keys_are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _parts(value.get_secret_value()):
            raise ValueError("expected keys separated by commas; nothing but commas would leave the service open")
        return value


def check_folders(settings: Settings) -> None:
    """Raises InvalidSetting for a models folder that is not there, or is none."""
    for folder in settings.models:
        if not folder.is_dir():
            raise InvalidSetting(f"models: {folder} {'is no folder' if folder.exists() else 'does not exist'}")


def unknown_variables(names: Iterable[str]) -> list[str]:
    """One line for each of these variables that looks like a setting and is none."""
    known = sorted(name.upper() for name in Settings.model_fields)
    lines = []
    for name in sorted(names):
        word = name.upper().removeprefix(PREFIX)
        if word != name.upper() and word not in known and not OTHERS.fullmatch(word):
            near = get_close_matches(word, known, 1)
            lines.append(f"{name} is no setting" + (f"; {PREFIX}{near[0]} is one" if near else ""))
    return lines


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
