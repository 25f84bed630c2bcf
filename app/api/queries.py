"""The queries of the interface: each parameter, its bounds and what it says of itself."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.engine.jobs import Numbers, Output
from app.terms import Convention, Precision, Tiling
from app.wire.fit import Fit
from app.wire.origin import Change, Pair, read_offsets, read_sizes


def _sizes(text: str) -> str:
    if read_sizes(text) is None:
        raise ValueError("a size is WxH in pixels, like 512x768; of several pictures, each, separated by commas")
    return text


def _offsets(text: str) -> str:
    if read_offsets(text) is None:
        raise ValueError("an offset is x,y in pixels, like 1,2; of several pictures, each, separated by semicolons")
    return text


def _colour(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{6}", text):
        raise ValueError("a colour is RRGGBB in hexadecimal, like ffffff")
    return text


FrameRule = Literal["trim", "pad", "error"]
"""What is done with frames of a clip that are more than a network takes whole latents of."""


class NoQuery(BaseModel):
    """No parameters at all; in a subclass, none but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


PRECISION = "The network's. auto: the service's own choice, again in fp32 where fp16 overflows."
TILING = "Bands of rows, for less memory and the same picture. auto: when memory is short."


class ModelQuery(NoQuery):
    """A model, and how its latents are meant."""

    model: str | None = Field(
        None,
        min_length=1,
        max_length=512,
        description="A name of GET /models, or at least 8 digits of a sha256. Absent: the service's default model.",
    )
    latents: Convention = Field(
        "scaled", description="scaled: as a diffusion model sees them. raw: as the network has them."
    )


class CommonQuery(ModelQuery):
    """Parameters of both operations."""

    precision: Precision = Field("auto", description=PRECISION)
    tiling: Tiling = Field("auto", description=TILING)
    deterministic: bool = Field(False, description="The same bytes for the same request, at some cost in speed.")


class PictureQuery(NoQuery):
    """How a picture is made ready for a network."""

    fit: Fit = Field(
        "pad",
        description="Where a side is no multiple of the network's factor: repeat the edge, keep the centre, resize to "
        "the nearest multiple, or refuse.",
    )
    background: Annotated[str, AfterValidator(_colour)] = Field(
        "ffffff",
        description="What shows through transparent pixels: RRGGBB in hexadecimal. Not for models that take alpha.",
    )

    @property
    def rgb(self) -> tuple[int, int, int]:
        """`background` as three bytes."""
        red, green, blue = bytes.fromhex(self.background)
        return red, green, blue


class EncodeQuery(CommonQuery, PictureQuery):
    """Parameters of /encode."""

    posterior: Literal["mode", "sample", "moments"] = Field(
        "mode",
        description="mode: the middle of the distribution that the encoder gives. sample: a draw from it. moments: "
        "its mean and its log-variance, raw, as the channels of one array; the latents themselves where a network has "
        "no variance.",
    )
    dtype: Numbers = Field("float16", description="Of the latents.")
    frames: FrameRule | None = Field(
        None,
        description="Takes an array of pictures, a zip of PNG, an APNG or an animated WebP for the frames of a clip, "
        "where the model has clips. Of a number that is not 4k + 1, trim drops the last ones, pad repeats the last, "
        "error refuses. Absent: pictures; of a video file error.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="Of posterior=sample: the same seed gives the same draw. Absent: another one each time."
    )


class SizedQuery(NoQuery):
    """How large a picture is sent, and how well."""

    size: Annotated[str, AfterValidator(_sizes)] | None = Field(
        None,
        max_length=8192,
        description="X-Image-Size of /encode: the picture comes back in this size. Without fit, any size to cut to. "
        "Absent: as a safetensors file says it, else as decoded.",
    )
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="Of JPEG, WebP and AVIF; 90 where nothing is said."
    )

    @property
    def sizes(self) -> tuple[Pair, ...] | None:
        """`size` as numbers, (width, height) of each picture or of all."""
        return None if self.size is None else read_sizes(self.size)


Preview = Literal["true", "linear", "tiny"]


class DecodeQuery(CommonQuery, SizedQuery):
    """Parameters of /decode."""

    fit: Change | None = Field(
        None,
        description="X-Image-Fit of /encode: pad cuts the padding off, resize resizes back, crop keeps the part that "
        "was encoded. Absent: as a safetensors file says it, else pad.",
    )
    offset: Annotated[str, AfterValidator(_offsets)] | None = Field(
        None, max_length=8192, description="X-Image-Offset of /encode, for fit=crop: told again with the answer."
    )
    bits: Literal["8", "16"] = Field("8", description="A channel, in PNG.")
    fps: Annotated[int, Field(ge=1, le=240)] | None = Field(
        None, description="Frames per second of a clip that moves; 16 where nothing is said."
    )
    lossless: bool = Field(False, description="Of a clip as WebP, MP4 or WebM: exactly the frames; larger.")
    dtype: Literal["uint8", "float16", "float32"] = Field(
        "uint8",
        description="Of an .npy. In floats the pictures are the network's own output: black at -1, white at 1, "
        "unclamped.",
    )

    preview: Preview | None = Field(
        None,
        description="A cheap picture instead: by a tiny autoencoder of the model's latent space where one is in the "
        "folder, else by a linear map, in the size of the raw latent's grid. Beside it are model, latents, quality and "
        "size alone; size resizes it.",
    )

    @property
    def output(self) -> Output:
        """`dtype` and `bits` as the engine has them."""
        return "uint16" if self.bits == "16" else self.dtype

    @property
    def offsets(self) -> tuple[Pair, ...]:
        """`offset` as numbers, (x, y) of each picture or of all."""
        return read_offsets(self.offset or "") or ()


Stream = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        pattern="^[A-Za-z0-9._-]+$",
        description="A name of the caller's for the stream, hard to guess: whoever knows it can look on.",
    ),
]


class StreamQuery(NoQuery):
    """Parameters of those who look on."""

    stream: Stream


class StepQuery(ModelQuery, SizedQuery):
    """Parameters of latents that are shown."""

    stream: Stream | None = Field(
        None, description="To whom the one latent of the body is shown. Absent: the answer shows every latent of it."
    )
    preview: Preview = Field("true", description="As of a decode.")
    size: Annotated[str, AfterValidator(_sizes)] | None = Field(
        None, max_length=64, description="WxH: the picture is resized to it. Absent: as it comes."
    )


class CompareQuery(PictureQuery):
    """Parameters of /compare."""

    models: str | None = Field(
        None,
        min_length=1,
        max_length=8192,
        description="Names or hashes, separated by commas. Absent: all usable models.",
    )
    precision: Precision = Field("auto", description=PRECISION)
    tiling: Tiling = Field("auto", description=TILING)

    @property
    def names(self) -> list[str] | None:
        """`models`, split at its commas, each once."""
        if self.models is None:
            return None
        return list(dict.fromkeys(name for part in self.models.split(",") if (name := part.strip())))


class LoadQuery(NoQuery):
    """Parameters of /models/{name}/load."""

    dtype: Precision = Field(
        "auto", description="The precision that it is loaded in. auto: the one that would be tried first."
    )


class UploadQuery(NoQuery):
    """Parameters of PUT /models/{name}."""

    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = Field(
        None, description="Of the file as it was sent: one that came otherwise is refused."
    )
    replace: bool = Field(False, description="Puts it in the place of a file of the same name.")


class PlanQuery(NoQuery):
    """Parameters of /models/{name}/plan: a picture's size in pixels and how it would be run."""

    op: Literal["encode", "decode"] = Field("decode", description="What would be done.")
    width: int = Field(1024, ge=1, le=1 << 16, description="Of the picture, in pixels.")
    height: int = Field(1024, ge=1, le=1 << 16, description="Of the picture, in pixels.")
    precision: Precision = Field("auto", description=PRECISION)
    tiling: Tiling = Field("auto", description=TILING)
