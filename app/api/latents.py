"""What latents say of themselves beside what their request says: convention, family, picture; and how they look."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import Request

from app.api.queries import DecodeQuery, ModelQuery
from app.api.work import Size
from app.errors import FamilyMismatch, InvalidParameter
from app.store.family import CUSTOM
from app.terms import Convention
from app.vae.families import FAMILIES, Family, takes
from app.vae.latent_format import LatentFormat
from app.wire.arrays.latents import LatentShape
from app.wire.origin import Change, Origin, contradiction, restored

HEADER = "X-Latents-Family"
LISTED = 4  # items that a warning names


@dataclass(frozen=True)
class WayBack:
    """What is done to each decoded picture."""

    result: Origin
    """What the answer says of them: their sizes, and where those that were cropped belong."""
    change: Change | None
    warning: str | None = None
    """A file that contradicts itself, in one line."""


def convention_of(query: ModelQuery, header: LatentShape, family: Family) -> Convention:
    """The latents' convention: the query's, or what a safetensors file says of itself. They must not disagree.

    A trainer's cache does not say it, and is taken to be of the model's family where the query says nothing. Raises
    FamilyMismatch where the family can have none.
    """
    said, asked = header.convention, "latents" in query.model_fields_set
    if said is None and header.cached and not asked:
        if family.cached is None:
            raise FamilyMismatch(f"caches of sd-scripts hold raw latents of a full VAE, which {family.name} is not")
        return family.cached
    if said is None or not asked:
        return said or query.latents
    if said != query.latents:
        raise InvalidParameter(f"latents={query.latents} was asked for, but the file says it holds {said} latents")
    return said


def check_family(request: Request, header: LatentShape, model: str, family: Family, convention: Convention) -> None:
    """Refuses latents of a family that the model does not decode, where the file or X-Latents-Family says it.

    Raises FamilyMismatch, and InvalidParameter for a header that is no family's name or contradicts the file.
    """
    said = told_family(request)
    if said is not None and header.family is not None and said != header.family:
        raise InvalidParameter(f"{HEADER} says {said}, but the file says it is of family {header.family[:80]}")
    came = said or header.family
    if came is not None and not takes(family.name, came, convention):
        raise FamilyMismatch(
            f"the latent says it is of family {came[:80]} ({convention}); the model {model} is of {family.name}"
        )


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


def warning(items: Sequence[np.ndarray], family: Family, convention: Convention) -> str | None:
    """One line where the statistics of latents (C, h, w) are far outside of what the convention makes them; else None.

    `Family.usual` has the bounds. Not told: raw latents of families that pack them or scale each channel by itself,
    and all of families whose constants are an operator's own.
    """
    form = family.latent_format
    if FAMILIES.get(family.name) != family:
        return None
    scale, shift = (form.scaling_factor, form.shift_factor) if convention == "raw" else (1.0, 0.0)
    if isinstance(scale, tuple) or isinstance(shift, tuple) or (convention == "raw" and form.patch > 1):
        return None
    least, greatest = (bound / scale for bound in family.usual)
    measured = [_measure(item, shift) for item in items]
    high = [index for index, (_, spread) in enumerate(measured) if spread > greatest]
    # Less spread than half of the size is a flat picture, which is small by nature.
    low = [index for index, (size, spread) in enumerate(measured) if size < least and spread > size / 2]
    if form == LatentFormat(patch=form.patch):  # scaled and raw are the same numbers
        guesses = ("are they of this family?",) * 2
    elif convention == "scaled":
        guesses = ("are they raw? latents=raw", "were they scaled twice?")
    else:
        guesses = ("are they of this family?", "are they scaled? latents=scaled")
    usual = f"{convention} {family.name} latents have about {1 / scale:.3g}"
    found = []
    if high:
        said = f"{_which(high, len(items))} a standard deviation of {measured[high[0]][1]:.3g} within a channel"
        found.append(f"{said}; {usual}, at most {greatest:.3g}: {guesses[0]}")
    if low:
        said = f"{_which(low, len(items))} a root mean square of {measured[low[0]][0]:.3g}"
        found.append(f"{said}; {usual}, at least {least:.3g}: {guesses[1]}")
    return "; ".join(found) or None


def told_family(request: Request) -> str | None:
    """What X-Latents-Family says, if it is there. Raises InvalidParameter for what is no family's name."""
    given = {value.strip() for value in request.headers.getlist(HEADER)}
    if not given:
        return None
    name = given.pop()
    if given or (name not in FAMILIES and name != CUSTOM):
        raise InvalidParameter(f"{HEADER} is one of {', '.join(FAMILIES)}, {CUSTOM}; got {name[:40]!a}")
    return name


def _measure(item: np.ndarray, shift: float) -> tuple[float, float]:
    """Root mean square about `shift` over everything; root mean square over channels of their standard deviations."""
    values = item.reshape(item.shape[0], -1).astype(np.float64)  # squares of float32 may be over its range
    values -= shift
    return float(np.sqrt(np.mean(values**2))), float(np.sqrt(np.mean(values.var(axis=1))))


def _which(found: list[int], items: int) -> str:
    if items == 1:
        return "the latent has"
    names = ", ".join(map(str, found[:LISTED])) + (", .." if len(found) > LISTED else "")
    return f"{len(found)} of {items} latents (index {names}) are unusual, the first of them has"
