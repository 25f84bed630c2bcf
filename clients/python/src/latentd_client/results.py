"""What comes back: latents, pictures, rows of models, comparisons."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import unquote

import httpx

from latentd_client.bodies import Array, Pathname, array_of, write_file

if TYPE_CHECKING:
    from PIL.Image import Image

_STAGE = re.compile(r"([\w-]+) *;(?:[^,]*;)? *dur=(\d+(?:\.\d+)?)")  # a proxy may have added its own

Convention = Literal["scaled", "raw"]
Change = Literal["pad", "crop", "resize"]
"""What was done to a picture of a size that the network does not take."""


@dataclass(frozen=True, eq=False)
class _Answer:
    """The body of an answer and what its headers say. None where a header is absent."""

    content: bytes = field(repr=False)
    media: str
    model: str
    sha256: str
    family: str | None
    convention: Convention
    plan: str  # `fp16/whole`, ...
    reason: str | None  # why it is not the first choice
    image_size: str | None  # `WxH`; of several sizes each, separated by commas
    image_fit: Change | None  # where a picture had to change
    image_offset: str | None
    posterior: str | None  # `gaussian` or `point`, of moments
    preview: str | None  # of a preview: `linear` or `tiny:NAME`, and `;db=` once that is known
    warning: str | None
    request_id: str
    timing: Mapping[str, float] = field(repr=False)  # stage: milliseconds

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """A good answer of /encode or /decode."""
        headers = response.headers
        warning = headers.get("x-warning")
        return cls(
            content=response.content,
            media=headers["content-type"].partition(";")[0].strip(),
            model=unquote(headers.get("x-model", "")),
            sha256=headers.get("x-model-sha256", ""),
            family=headers.get("x-latents-family"),
            convention=headers.get("x-latents", "scaled"),
            plan=headers.get("x-plan", ""),
            reason=headers.get("x-plan-reason"),
            image_size=headers.get("x-image-size"),
            image_fit=headers.get("x-image-fit"),
            image_offset=headers.get("x-image-offset"),
            posterior=headers.get("x-posterior"),
            preview=headers.get("x-preview"),
            warning=None if warning is None else unquote(warning),
            request_id=headers.get("x-request-id", ""),
            timing=_timing(headers.get("server-timing", "")),
        )

    @cached_property
    def array(self) -> Array:
        """The content as an array. Raises ValueError for a type that is none, such as zip."""
        return array_of(self.content, self.media)

    def save(self, path: Pathname) -> None:
        """Writes the content as it came. Raises OSError."""
        write_file(path, self.content)


@dataclass(frozen=True, eq=False)
class Encoded(_Answer):
    """Latents: `array` is (N, C, h, w). `decode` takes it as it is and gives the picture in its own size."""


@dataclass(frozen=True, eq=False)
class Decoded(_Answer):
    """Pictures: `array` is (N, H, W, 3), uint8 or what `dtype` said."""

    @property
    def pictures(self) -> "list[Image]":
        """As PIL pictures; needs Pillow. Raises ValueError for floats."""
        from PIL import Image

        if self.array.dtype != "uint8":
            raise ValueError(f"pictures are uint8; these are {self.array.dtype}, black -1 and white 1")
        return [Image.fromarray(each) for each in self.array]


@dataclass(frozen=True)
class Statistics:
    """Of latents that are normalised per channel by numbers of the checkpoint: FLUX.2's BatchNorm over patches."""

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    eps: float
    patch: int


@dataclass(frozen=True)
class Model:
    """A row of the models. A file that cannot be used has an `error` and nothing else."""

    name: str
    path: str
    family: str | None = None
    family_source: str | None = None
    format: str | None = None
    sha256: str | None = None
    known_as: str | None = None
    copy_of: str | None = None
    parameters: int | None = None
    latent_channels: int | None = None
    spatial_factor: int | None = None
    pixel_channels: int | None = None  # 3, or 4 of a model that takes and gives alpha
    scaling_factor: float | list[float] | None = None
    shift_factor: float | list[float] | None = None
    fp16: str | None = None
    statistics: Statistics | None = None  # of `model(name)` alone
    error: str | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """A row of the JSON; columns that are unknown here are left out."""
        known = _known(cls, row)
        if found := known.get("statistics"):
            mean, variance = tuple(found["mean"]), tuple(found["variance"])
            known["statistics"] = Statistics(mean, variance, found["eps"], found["patch"])
        return cls(**known)


@dataclass(frozen=True)
class Compared:
    """One model's round trip of a picture; with an `error`, no numbers."""

    model: str
    sha256: str | None = None
    family: str | None = None
    plan: str | None = None
    identical: bool | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    luminance_shift: float | None = None
    saturation_shift: float | None = None
    hue_shift_degrees: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One picture through many models; `sheet` is a PNG."""

    image_size: str
    models: tuple[Compared, ...]
    sheet: bytes = field(repr=False)

    @classmethod
    def of(cls, numbers: dict[str, Any], sheet: bytes) -> Self:
        """From the JSON and the picture."""
        rows = tuple(Compared(**_known(Compared, row)) for row in numbers["models"])
        return cls(numbers["image_size"], rows, sheet)


def _known(kind: type[Any], row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TypeError(f"expected a row, got {row!r:.40}")
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in row.items() if key in names}


def _timing(header: str) -> dict[str, float]:
    return {name: float(ms) for name, ms in _STAGE.findall(header)}
