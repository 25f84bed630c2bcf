"""The queries and the JSON bodies of the interface."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.terms import Convention, Precision, Tiling


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", text):
        raise ValueError("a size is WxH in pixels, like 512x768")
    return text


def _colour(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{6}", text):
        raise ValueError("a colour is RRGGBB in hexadecimal, like ffffff")
    return text


class NoQuery(BaseModel):
    """No parameters at all; in a subclass, none but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CommonQuery(NoQuery):
    """Parameters of both operations."""

    model: str | None = Field(None, min_length=1, max_length=512)
    latents: Convention = "scaled"
    precision: Precision = "auto"
    tiling: Tiling = "auto"
    deterministic: bool = False


class PictureQuery(NoQuery):
    """How a picture is made ready for a network."""

    fit: Literal["pad", "crop", "resize", "error"] = "pad"
    background: Annotated[str, AfterValidator(_colour)] = "ffffff"

    @property
    def rgb(self) -> tuple[int, int, int]:
        """`background` as three bytes."""
        red, green, blue = bytes.fromhex(self.background)
        return red, green, blue


class EncodeQuery(CommonQuery, PictureQuery):
    """Parameters of /encode."""

    posterior: Literal["mode", "sample"] = "mode"
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class DecodeQuery(CommonQuery):
    """Parameters of /decode."""

    size: Annotated[str, AfterValidator(_size)] | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    bits: Literal["8", "16"] = "8"

    @property
    def width_height(self) -> tuple[int, int] | None:
        """`size` as numbers."""
        if self.size is None:
            return None
        width, height = self.size.split("x")
        return int(width), int(height)


class CompareQuery(PictureQuery):
    """Parameters of /compare."""

    models: str | None = Field(None, min_length=1, max_length=8192)  # comma separated; absent: all usable
    precision: Precision = "auto"
    tiling: Tiling = "auto"

    @property
    def names(self) -> list[str] | None:
        """`models`, split at its commas, each once."""
        if self.models is None:
            return None
        return list(dict.fromkeys(name for part in self.models.split(",") if (name := part.strip())))


class LoadQuery(NoQuery):
    """Parameters of /models/{name}/load."""

    dtype: Precision = "auto"


class PlanQuery(NoQuery):
    """Parameters of /models/{name}/plan: a picture's size in pixels and how it would be run."""

    op: Literal["encode", "decode"] = "decode"
    width: int = Field(1024, ge=1, le=1 << 16)
    height: int = Field(1024, ge=1, le=1 << 16)
    precision: Precision = "auto"
    tiling: Tiling = "auto"


class Resident(BaseModel):
    """One copy of a model on one device."""

    device: str
    dtype: str
    bytes: int
    in_use: int
    pinned: bool


class Model(BaseModel):
    """One row of GET /models. A file that cannot be read has an `error` and nulls."""

    name: str
    path: str
    family: str | None = None
    family_source: Literal["config", "checkpoint", "hash", "operator", "default"] | None = None
    format: str | None = None
    sha256: str | None = None
    known_as: str | None = None
    copy_of: str | None = None  # the model in the folder whose weights these are
    parameters: int | None = None
    latent_channels: int | None = None
    spatial_factor: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    fp16: Literal["ok", "overflows", "unknown"] | None = None
    resident: list[Resident] = []
    error: str | None = None


class Models(BaseModel):
    """GET /models."""

    models: list[Model]
    default: str | None = None  # what a request without `model` means now; null where it must say


class Plan(BaseModel):
    """GET /models/{name}/plan: what would happen now. Bytes of working memory, weights not included."""

    device: str
    plan: str | None  # null: does not fit
    forecast_bytes: int | None
    free_bytes: int
    available_bytes: int  # with idle models evicted
    plans: dict[str, int]  # the forecast of every plan that the request allows


class Compared(BaseModel):
    """One model's round trip in POST /compare. Shifts are the round trip's minus the original's, CIELAB throughout."""

    model: str
    sha256: str | None = None
    family: str | None = None
    plan: str | None = None  # of the decode, like fp16/whole
    identical: bool | None = None  # every byte came back
    psnr_db: float | None = None  # over 8-bit RGB; null where identical: JSON has no infinity
    ssim: float | None = None
    luminance_shift: float | None = None  # mean lightness L*, of 100; above 0: lighter
    saturation_shift: float | None = None  # mean chroma C*; below 0: paler
    hue_shift_degrees: float | None = None  # in (-180, 180], pixels weighted by chroma
    error: str | None = None  # then all numbers are null


class Comparison(BaseModel):
    """POST /compare as JSON."""

    image_size: str  # WxH of what was measured
    models: list[Compared]


class Problem(BaseModel):
    """An error (RFC 9457, application/problem+json)."""

    type: str  # urn:latentd:problem:CODE
    title: str
    status: int
    detail: str
    instance: str  # the path that was asked for
    code: str
    request_id: str
    retryable: bool  # the same request may succeed later
