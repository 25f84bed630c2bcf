"""What `encode` makes of a picture file before it is sent: its bucket's size, and its mirrored twin."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from app.tools.buckets import Buckets, Cut, Size, cut_picture
from app.wire.headers import PictureHeader, read_header
from app.wire.images import WHITE, read_image
from app.wire.png import write_png

Form = Literal["npy", "safetensors", "kohya"]

Write = Callable[[npt.NDArray[np.uint8]], bytes]
"""A body of pixels (H, W, 3), of a kind that /encode reads."""


@dataclass(frozen=True)
class Wish:
    """What is to become of pictures besides being encoded."""

    buckets: Buckets | None = None
    flip: bool = False  # the mirrored twin is encoded as well
    form: Form | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For the manifest: only what was asked for."""
        told = {"buckets": self.buckets and self.buckets.text, "flip": self.flip, "format": self.form}
        return {name: value for name, value in told.items() if value}

    @property
    def changes(self) -> bool:
        """Whether pictures are decoded here, and not sent as they are."""
        return self.buckets is not None or self.flip

    def seen(self, header: PictureHeader) -> PictureHeader:
        """As the picture is taken: sd-scripts reads no EXIF, and would not find what was turned upright."""
        return replace(header, orientation=1) if self.form == "kohya" else header

    def size(self, header: PictureHeader) -> Size:
        """(width, height) that is encoded; without buckets the network may still want it larger."""
        width, height = self.seen(header).shown
        return self.buckets.cut(width, height).bucket if self.buckets else (width, height)


@dataclass(frozen=True)
class Ready:
    """What is sent."""

    bodies: list[bytes]  # the picture; its mirrored twin
    pixels: int  # of them all; 0 where only the service can tell
    cut: Cut | None = None


def ready(body: bytes, wish: Wish, max_pixels: int, write: Write = write_png) -> Ready:
    """A picture file as it is to be sent; untouched where nothing is asked for. Raises as `read_image`."""
    header = wish.seen(read_header(body))
    width, height = header.shown
    if not wish.changes:
        return Ready([body], width * height)
    picture = read_image(body, header, background=WHITE, max_pixels=max_pixels)
    cut = wish.buckets.cut(width, height) if wish.buckets else None
    if cut is not None:
        picture = cut_picture(picture, cut)
    twins = [picture, np.ascontiguousarray(picture[:, ::-1])] if wish.flip else [picture]
    return Ready([write(each) for each in twins], sum(each.shape[0] * each.shape[1] for each in twins), cut)


def weight(header: PictureHeader, wish: Wish) -> int:
    """Bytes of memory that the picture takes until it is answered, its file aside."""
    if not wish.changes:
        return 0
    width, height = wish.size(header)
    return 3 * width * height * (1 + wish.flip)
