"""The JSON bodies of the interface's answers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


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
    pixel_channels: int | None = None  # 3, or 4 of a model that takes and gives alpha
    scaling_factor: float | tuple[float, ...] | None = None  # a list: one number per channel
    shift_factor: float | tuple[float, ...] | None = None
    fp16: Literal["ok", "overflows", "unknown"] | None = None
    resident: list[Resident] = []
    error: str | None = None


class Statistics(BaseModel):
    """What packed latents are normalised by, channel by channel: (z - mean) / sqrt(variance + eps)."""

    model_config = ConfigDict(from_attributes=True)

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    eps: float
    patch: int  # positions along one side of a raw latent that become channels


class OneModel(Model):
    """GET /models/{name}: the row, and what is read off the file for it."""

    statistics: Statistics | None = None  # of FLUX.2


class Models(BaseModel):
    """GET /models."""

    models: list[Model]
    default: str | None = None  # what a request without `model` means now; null where it must say


class Plan(BaseModel):
    """GET /models/{name}/plan: what would happen now. Bytes of working memory, weights not included."""

    model_config = ConfigDict(from_attributes=True)

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


class Health(BaseModel):
    """A probe's answer: 200 with ok, or 503 with failing and what it is that fails."""

    status: Literal["ok", "failing"]
    lost: str | None = None  # why the device is lost
    scanned: bool | None = None  # the folder has been read once
    device: bool | None = None  # there is one that works
    draining: bool | None = None  # shutting down


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
