"""Settings: everything an operator decides, read once, from LATENTD_* variables and the command line."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.engine.batcher import QueueLimits
from app.terms import Precision

_QUEUE = QueueLimits()


class InvalidSetting(ValueError):
    """A setting that only the machine or the tables of the service can tell to be wrong; the text names it."""


class Settings(BaseSettings):
    """Frozen. Byte and pixel limits are plain integers. An empty variable is an unset one."""

    model_config = SettingsConfigDict(env_prefix="LATENTD_", env_ignore_empty=True, frozen=True, extra="ignore")

    models: Path = Path("models")
    default_model: str | None = None
    default_family: str = "sd1"
    device: str = "auto"
    cache_bytes: int | None = Field(None, gt=0)
    memory_limit_bytes: int | None = Field(None, gt=0)
    precision: Precision = "auto"
    queue_size: int = Field(_QUEUE.items, gt=0)
    queue_pixels: int = Field(_QUEUE.pixels, gt=0)
    batch_pixels: int = Field(_QUEUE.batch_pixels, gt=0)
    max_body_bytes: int = Field(256 << 20, gt=0)
    buffer_bytes: int | None = Field(None, gt=0)
    max_connections: int = Field(1000, gt=0)
    max_pixels: int = Field(8192 * 8192, gt=0)
    drain_seconds: float = Field(30.0, ge=0, le=86_400)
    api_keys: SecretStr | None = None  # comma separated
    admin_key: SecretStr | None = None
    metrics_public: bool = True
    log_format: Literal["json", "text"] = "text"

    @property
    def devices(self) -> tuple[str, ...]:
        """`device`, split at its commas."""
        return _parts(self.device)

    @property
    def keys(self) -> frozenset[str]:
        """`api_keys`, split at their commas; none: the service is open."""
        return frozenset(_parts(self.api_keys.get_secret_value())) if self.api_keys else frozenset()

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


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
