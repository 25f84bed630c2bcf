"""How decoded pictures get back to what was encoded: by what the query says, and what the file says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.api.schemas import DecodeQuery
from app.api.work import Size
from app.errors import InvalidParameter
from app.wire.arrays import LatentShape
from app.wire.origin import Change, Origin, contradiction, restored


@dataclass(frozen=True)
class WayBack:
    """What is done to each decoded picture."""

    result: Origin
    """What the answer says of them: their sizes, and where those that were cropped belong."""
    change: Change | None
    warning: str | None = None
    """A file that contradicts itself, in one line."""


def way_back(query: DecodeQuery, header: LatentShape, decoded: Sequence[Size], multiple: int) -> WayBack:
    """`size`, `fit` and `offset` of the query, each else as the file says it; else pictures stay as they are decoded.

    Raises InvalidParameter where the query does not fit the pictures. A file that does not is left alone and told of.
    """
    said, as_decoded = header.origin, Origin(tuple(decoded))
    sizes = query.sizes or (said.sizes if said else None)
    change = query.fit or (said.change if said else None)
    if query.offset and change != "crop":
        raise InvalidParameter("offset is for fit=crop: it says where in the original the picture belongs")
    if sizes is None:
        if query.fit or query.offset:
            raise InvalidParameter(f"fit={query.fit} needs size=WxH, the original's: X-Image-Size of /encode")
        return WayBack(as_decoded, None)
    origin = Origin(sizes, change, query.offsets or (said.offsets if said and change == "crop" else ()))
    wrong = contradiction(origin, decoded, multiple, exactly=query.sizes is None)
    if wrong and (query.size or query.fit):
        hint = "; fit=pad cuts to any size" if change in ("crop", "resize") else ""
        asked_for = f"size={query.size[:80]}" if query.size else f"fit={query.fit}"
        raise InvalidParameter(f"{asked_for}: {wrong}{hint}")
    if wrong:
        return WayBack(as_decoded, None, f"left as decoded, for what the file says of its picture is not so: {wrong}")
    return WayBack(restored(origin, decoded), change)
