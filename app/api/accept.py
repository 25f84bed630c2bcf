"""Which of the types that we can write the client wants: the Accept header (RFC 9110, 12.5.1)."""

import re

from app.errors import NotAcceptable

_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def negotiate(accept: str, offers: tuple[str, ...]) -> str:
    """The offer with the highest weight; the first offer where several tie, or where nothing is asked for.

    Raises NotAcceptable naming the offers when the header excludes all of them.
    """
    ranges = dict(_range(part) for part in accept.split(",") if part.strip())
    if not ranges:
        return offers[0]
    best = max(offers, key=lambda offer: _weight(offer, ranges))
    if _weight(best, ranges) <= 0:
        raise NotAcceptable(f"this answer can be {', '.join(offers)}; the request accepts {accept[:200]}")
    return best


def _range(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return kind, float(value) if _WEIGHT.fullmatch(value.strip()) else 0.0
    return kind, 1.0


def _weight(offer: str, ranges: dict[str, float]) -> float:
    """The weight of the most specific range that covers the offer."""
    for kind in (offer, offer.split("/", maxsplit=1)[0] + "/*", "*/*"):
        if kind in ranges:
            return ranges[kind]
    return 0.0
