"""What pictures were before they were fitted to a network: as text in headers, metadata and queries; and the way back.

Sizes are `WxH`, offsets `x,y`, in pixels. One stands for all pictures of a batch; else there is one for each, sizes
separated by commas, offsets by semicolons.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy.typing as npt

from app.errors import InvalidImage, InvalidLatent
from app.wire.fit import Fit, fitted_size, resized

Change = Literal["pad", "crop", "resize"]
"""What fitting did to a picture."""
Pair = tuple[int, int]
"""(width, height) or (x, y) in pixels."""

_SIZE = re.compile("([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")
_OFFSET = re.compile("([0-9]{1,7}),([0-9]{1,7})")


@dataclass(frozen=True)
class Origin:
    """The pictures that a batch of latents comes from."""

    sizes: tuple[Pair, ...]
    """(width, height) before they were fitted, of each or of all."""
    change: Change | None = None
    """None where none of them had to change."""
    offsets: tuple[Pair, ...] = ()
    """(x, y) of the first pixel that `crop` kept, of each or of all."""

    def size(self, index: int) -> Pair:
        """(width, height) of one of them."""
        return self.sizes[index if len(self.sizes) > 1 else 0]

    def offset(self, index: int) -> Pair:
        """(x, y) of one of them; (0, 0) where nothing was cropped."""
        return self.offsets[index if len(self.offsets) > 1 else 0] if self.offsets else (0, 0)


def origin_of(sizes: Sequence[Pair], multiple: int, mode: Fit) -> Origin:
    """The origin of pictures of these sizes that `fit` makes multiples of `multiple`; raises as `fitted_size`."""
    fitted = [fitted_size(*size, multiple, mode) for size in sizes]
    if mode == "error" or fitted == list(sizes):
        return Origin(tuple(sizes))
    return Origin(tuple(sizes), mode, _centred(sizes, fitted) if mode == "crop" else ())


def texts(origin: Origin) -> dict[str, str]:
    """`image_size`, and `image_fit` and `image_offset` where they say something: what a decode needs to come back."""
    found = {"image_size": ", ".join(f"{width}x{height}" for width, height in _shortest(origin.sizes))}
    if origin.change is not None:
        found["image_fit"] = origin.change
    if origin.offsets:
        found["image_offset"] = "; ".join(f"{x},{y}" for x, y in _shortest(origin.offsets))
    return found


def read_origin(metadata: Mapping[str, str]) -> Origin | None:
    """What `texts` wrote; None where there is no size. Raises InvalidLatent for what cannot be read."""
    if "image_size" not in metadata:
        return None
    sizes, offsets = read_sizes(metadata["image_size"]), read_offsets(metadata.get("image_offset", "0,0"))
    change = metadata.get("image_fit")
    if sizes is None:
        raise InvalidLatent(f"expected the metadata's image_size as WIDTHxHEIGHT, got {metadata['image_size'][:40]!r}")
    if offsets is None:
        raise InvalidLatent(f"expected the metadata's image_offset as X,Y, got {metadata['image_offset'][:40]!r}")
    if change is not None and change not in get_args(Change):
        raise InvalidLatent(f"expected the metadata's image_fit to be pad, crop or resize, got {change[:40]!r}")
    return Origin(sizes, cast(Change | None, change), offsets if "image_offset" in metadata else ())


def read_sizes(text: str) -> tuple[Pair, ...] | None:
    """`WxH`, or several separated by commas; None for other text."""
    return _pairs(_SIZE, text.split(","))


def read_offsets(text: str) -> tuple[Pair, ...] | None:
    """`x,y`, or several separated by semicolons; None for other text."""
    return _pairs(_OFFSET, text.split(";"))


def contradiction(origin: Origin, decoded: Sequence[Pair], multiple: int, *, exactly: bool) -> str | None:
    """Why pictures of these sizes, as they are decoded, cannot come from there; None where they can.

    `exactly`: padding is what `fit` would have padded; else a size is whatever can be cut out.
    """
    change = origin.change or "pad"
    for what, listed in (("sizes", origin.sizes), ("offsets", origin.offsets)):
        if len(listed) > 1 and len(listed) != len(decoded):
            return f"there are {len(listed)} {what} for {len(decoded)} pictures"
    for index, (width, height) in enumerate(decoded):
        size, (x, y) = origin.size(index), origin.offset(index)
        if change == "pad" and not exactly:
            if size[0] > width or size[1] > height:
                return f"{size[0]}x{size[1]} is larger than the picture, {width}x{height}"
            continue
        try:
            fitted = fitted_size(*size, multiple, change)
        except InvalidImage as error:
            return str(error)
        if fitted != (width, height):
            return (
                f"fit={change} makes {fitted[0]}x{fitted[1]} of {size[0]}x{size[1]}, the picture has {width}x{height}"
            )
        if change == "crop" and (x + width > size[0] or y + height > size[1]):
            return f"{width}x{height} from {x},{y} on are not inside of {size[0]}x{size[1]}"
    return None


def restored(origin: Origin, decoded: Sequence[Pair]) -> Origin:
    """What pictures of these sizes are once each has gone through `restore`.

    Their own size, unless they are parts of what was cropped: those stay as they are, and it says where they belong.
    """
    if origin.change == "crop":
        sizes = [origin.size(index) for index in range(len(decoded))]
        return Origin(tuple(decoded), "crop", origin.offsets or _centred(sizes, decoded))
    return Origin(tuple(origin.size(index) for index in range(len(decoded))))


def restore(picture: npt.NDArray[Any], size: Pair, change: Change | None) -> npt.NDArray[Any]:
    """A decoded picture (H, W, 3) as (width, height) `size` again: resized, or cut to it."""
    if change != "resize":
        return picture[: size[1], : size[0]]
    return picture if picture.shape[1::-1] == size else resized(picture, size)


def _shortest(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    return pairs[:1] if len(set(pairs)) == 1 else pairs


def _centred(sizes: Sequence[Pair], kept: Sequence[Pair]) -> tuple[Pair, ...]:
    pairs = zip(sizes, kept, strict=True)
    return tuple(((width - inner[0]) // 2, (height - inner[1]) // 2) for (width, height), inner in pairs)


def _pairs(pattern: re.Pattern[str], parts: list[str]) -> tuple[Pair, ...] | None:
    found = [pattern.fullmatch(part.strip()) for part in parts]
    pairs = tuple((int(match[1]), int(match[2])) for match in found if match)
    return pairs if len(pairs) == len(parts) else None
