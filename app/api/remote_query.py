"""What Hugging Face's clients of remote VAEs say in a query, and what their factors do to latents."""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.errors import InvalidLatent, InvalidParameter, NonFiniteOutput
from app.terms import Convention


def _sides(given: object) -> object:
    """`shape=1&shape=4`, and `shape=1,4` or `shape=[1, 4]` too."""
    if not isinstance(given, list):
        return given
    return [part for text in given for part in str(text).strip(" []()").split(",") if part.strip()]


class RemoteQuery(BaseModel):
    """What both operations say of a tensor."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    shape: Annotated[list[int], BeforeValidator(_sides)] = Field([], max_length=8)
    dtype: Literal["float16", "float32", "bfloat16", "uint8"] | None = None
    scaling_factor: float | None = Field(None, gt=0, allow_inf_nan=False)
    shift_factor: float | None = Field(None, allow_inf_nan=False)

    @property
    def tensor(self) -> tuple[list[int], str]:
        """Shape and dtype of the bytes; raises InvalidParameter where they are not said."""
        if not self.shape or self.dtype is None:
            raise InvalidParameter("a tensor needs shape=..&shape=.. and dtype=float16, float32 or bfloat16")
        return self.shape, self.dtype


class RemoteDecodeQuery(RemoteQuery):
    """What a decode says besides."""

    do_scaling: bool | None = None
    output_type: Literal["pil", "pt", "mp4"] = "pil"
    image_format: Literal["jpg", "jpeg", "png"] | None = None
    partial_postprocess: bool = False
    height: int | None = Field(None, ge=1, le=1 << 24)
    width: int | None = Field(None, ge=1, le=1 << 24)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    @property
    def convention(self) -> Convention:
        """Of the latents, once `unscaled` has been through them."""
        return "scaled" if self.do_scaling and self.scaling_factor is None else "raw"

    def unscaled(self, latents: np.ndarray) -> np.ndarray:
        """Latents as the factors that came with them make them; as they are with do_scaling=False, or without any."""
        if self.convention == "scaled" or self.do_scaling is False:
            return latents
        if self.scaling_factor is None and self.shift_factor is None:
            return latents
        with np.errstate(all="ignore"):  # what float32 cannot hold is told below
            raw = latents.astype(np.float32) / np.float32(self.scaling_factor or 1) + np.float32(self.shift_factor or 0)
        if not np.isfinite(raw).all():
            raise InvalidLatent(f"latents come out infinite by scaling_factor={self.scaling_factor}")
        return raw


class RemoteEncodeQuery(RemoteQuery):
    """What an encode says: nothing more."""

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """float32 latents by the factors that came, as float16; raises NonFiniteOutput where that cannot hold them."""
        with np.errstate(all="ignore"):
            shifted = raw - np.float32(self.shift_factor or 0)
            half = (shifted * np.float32(self.scaling_factor or 1)).astype(np.float16)
        if not np.isfinite(half).all():
            raise NonFiniteOutput("the latents, scaled as asked, do not fit into float16")
        return half
