"""What the numbers of a picture mean -> sRGB: ICC profiles, and the chunks of PNG that say it in other ways."""

import io
import struct
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from app.errors import InvalidImage
from app.wire.png import inflate_profile

_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}
_HDR = {16: "PQ", 18: "HLG"}
_SRGB_PRIMARIES, _P3_PRIMARIES = (1, 2), 12  # 2: not said
_P3_D50 = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
_SRGB_GAMMA = 45455
_UNITS = 100_000  # of gAMA
_NEAR = 0.05  # as libpng has it: a lesser difference shows nowhere


def check_colour(colour: dict[bytes, bytes], name: str) -> None:
    """Raises InvalidImage for a picture of the format `name` whose CICP numbers cannot be turned into sRGB."""
    if (said := _cicp(colour)) is None:
        return
    primaries, transfer = said
    if transfer in _HDR:
        raise InvalidImage(f"the {name} is HDR ({_HDR[transfer]}), as its CICP says; expected sRGB or Display P3")
    if primaries not in (*_SRGB_PRIMARIES, _P3_PRIMARIES):
        raise InvalidImage(
            f"the {name} has colour primaries {primaries}, as its CICP says; expected 1 (sRGB) or 12 (Display P3)"
        )


def profile_of(colour: dict[bytes, bytes], embedded: bytes | None) -> bytes | None:
    """The ICC profile of a picture, `embedded` where it is no PNG's; None where its numbers are sRGB's or unknown."""
    if (said := _cicp(colour)) is not None:
        return display_p3() if said[0] == _P3_PRIMARIES else None
    return inflate_profile(colour[b"iCCP"]) if b"iCCP" in colour else embedded


def gamma_of(colour: dict[bytes, bytes]) -> float | None:
    """The exponent that gAMA gives, 1 for light itself; None where something else says more, and where it is sRGB's."""
    said = colour.get(b"gAMA", b"")
    if len(said) < 4 or colour.keys() & {b"sRGB", b"iCCP"} or _cicp(colour) is not None:
        return None
    value = int.from_bytes(said)
    if not _UNITS / 10 <= value <= _UNITS * 10 or abs(value / _SRGB_GAMMA - 1) < _NEAR:
        return None
    return value / _UNITS


def curve(gamma: float, levels: int) -> npt.NDArray[np.uint8]:
    """sRGB, 8 bits, of each of `levels` numbers that light was raised to `gamma` for."""
    light = np.linspace(0, 1, levels) ** (1 / gamma)
    srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * srgb).astype(np.uint8)


def to_srgb(image: Image.Image, profile: bytes | None, gamma: float | None) -> Image.Image:
    """RGB in sRGB; a profile that is broken, or of another colour space than the picture's, is ignored."""
    if gamma is not None:
        image = image.point([int(value) for value in curve(gamma, 256)] * len(image.getbands()))
    with suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        mode = _MODES.get(source.profile.xcolor_space)
        if mode == "RGB" and image.mode == "L":  # grey files often carry the profile of an RGB screen
            image = image.convert("RGB")
        if mode == image.mode:
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
            return transform.apply(image)
    return image.convert("RGB")


def display_p3() -> bytes:
    """An ICC profile of Display P3: that of sRGB, whose curve it shares, with other primaries."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (tags,) = struct.unpack_from(">I", profile, 128)
    for at in range(132, 132 + 12 * tags, 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, at)
        if name in _P3_D50:
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in _P3_D50[name]))
    return bytes(profile)


def _cicp(colour: dict[bytes, bytes]) -> tuple[int, int] | None:
    """(primaries, transfer), as ITU-T H.273 numbers them."""
    said = colour.get(b"cICP", b"")
    return (said[0], said[1]) if len(said) == 4 else None
