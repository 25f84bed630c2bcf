"""Picture files <-> uint8 pixels: PNG, JPEG, WebP and AVIF, always upright and sRGB as an array.

Pillow decodes, but only what `headers` hands it, through the format's own plugin: `Image.open` would warn about
sizes against a limit that is global to the process, and the limit here is an argument.
"""

import io
import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from app.errors import InvalidParameter, MalformedBody, NotAcceptable, TooLarge
from app.wire.colour import curve, gamma_of, profile_of, to_srgb
from app.wire.headers import PictureHeader
from app.wire.png import Pixels, check_chunks, write_png
from app.wire.scan import Body

DEFAULT_QUALITY = 90

Colour = tuple[int, int, int]
"""Red, green, blue."""
WHITE = (255, 255, 255)
"""Behind what is transparent, where nothing else is said."""

_PLUGINS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "AVIF": AvifImageFile,
}
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, RuntimeError)  # the last is libavif's
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPAQUE = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
_LOSSY = {"image/jpeg": ("JPEG", 65500), "image/webp": ("WEBP", 16383), "image/avif": ("AVIF", 16384)}
"""Pillow's name and the longest side of each format; of AVIF as libavif reads it, 16384 x 16384 pixels at most."""
OPAQUE = ("image/jpeg",)
"""Types of pictures that have no alpha."""
_SETTINGS: dict[str, dict[str, int]] = {
    "JPEG": {},
    "WEBP": {"method": 2},  # takes half the time of the default 4 for 3 % more bytes
    "AVIF": {"speed": 9, "max_threads": 1},  # a quarter of the time of 8 for 6 % more; a thread of ours has a core each
}


def read_image(
    body: Body, header: PictureHeader, *, background: Colour | None, max_pixels: int
) -> npt.NDArray[np.uint8]:
    """The first frame of a PNG, JPEG, WebP or AVIF file as uint8 (H, W, 3) sRGB, upright, over `background`.

    Without one it keeps its alpha, straight and 255 where the file has none: (H, W, 4). `header` is what `read_header`
    says of the body. Raises TooLarge above `max_pixels` before any pixel is decoded, and MalformedBody for a truncated
    or corrupt file.
    """
    if header.width * header.height > max_pixels:
        raise TooLarge(f"the picture has {header.width}x{header.height} pixels, more than the limit of {max_pixels}")
    return _as_asked(_decode(body, header), header, background)


def read_frames(
    body: Body, header: PictureHeader, *, background: Colour | None, max_pixels: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """All frames of an APNG or an animated WebP file, each as `read_image` has one: composed, one after the other.

    Of any other picture file the one that there is. Raises as `read_image`.
    """
    if header.frames == 1 or header.format not in ("PNG", "WebP"):
        yield read_image(body, header, background=background, max_pixels=max_pixels)
        return
    if header.width * header.height > max_pixels:
        raise TooLarge(f"the picture has {header.width}x{header.height} pixels, more than the limit of {max_pixels}")
    try:
        moving = _PLUGINS[header.format](io.BytesIO(body))
        if moving.size != (header.width, header.height):
            raise MalformedBody(f"the {header.format} file states two different sizes")
        first = int(bool(moving.info.get("default_image")))  # which stands for the film where none is shown
        for index in range(first, first + header.frames):
            moving.seek(index)
            yield _as_asked(moving.copy(), header, background)
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise TooLarge(f"a {header.format} file of {header.width}x{header.height} pixels is not decoded") from error
    except _DECODE_ERRORS as error:
        raise _corrupt(header, error) from error


def _as_asked(image: Image.Image, header: PictureHeader, background: Colour | None) -> npt.NDArray[np.uint8]:
    gamma = gamma_of(header.colour)
    profile = profile_of(header.colour, image.info.get("icc_profile"))
    try:
        image, alpha, gamma = _split(image, gamma)
    except _DECODE_ERRORS as error:  # a palette, or a colour that is transparent, that Pillow only looks at here
        raise _corrupt(header, error) from error
    image = to_srgb(image, profile, gamma)
    if background is None:
        image.putalpha(255 if alpha is None else alpha)
    elif alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    if header.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[header.orientation])
    return np.array(image)


def write_image(pixels: Pixels, media_type: str, *, quality: int | None = None) -> bytes:
    """A picture file of pixels (H, W, 3), uint8, or for image/png uint16: also image/jpeg, image/webp or image/avif.

    Pixels (H, W, 4) have straight alpha, which image/jpeg lacks: there they are laid over white. `quality` is 1 to 100,
    not for PNG; without it 90. Raises InvalidParameter for a quality or a depth that the format does not have, and
    NotAcceptable for other media types and for sides over the format's limit.
    """
    if media_type == "image/png":
        if quality is not None:
            raise InvalidParameter(f"quality is for {', '.join(_LOSSY)}; image/png is lossless")
        return write_png(pixels)
    if media_type not in _LOSSY:
        raise NotAcceptable(f"expected image/png, {' or '.join(_LOSSY)}, got {media_type!r}")
    if pixels.dtype != np.uint8:
        raise InvalidParameter(f"{media_type} has 8 bits a channel; 16 are for image/png")
    if quality is not None and not 1 <= quality <= 100:
        raise InvalidParameter(f"expected a quality of 1 to 100, got {quality}")
    height, width, _ = pixels.shape
    check_sides(width, height, media_type)
    name, _ = _LOSSY[media_type]
    image = Image.fromarray(pixels)
    if media_type in OPAQUE and image.mode == "RGBA":
        image = _over(image, WHITE)
    file = io.BytesIO()
    image.save(file, name, quality=quality or DEFAULT_QUALITY, **_SETTINGS[name])
    return file.getvalue()


def write_webp(pixels: npt.NDArray[np.uint8], lossless: bool) -> bytes:
    """A WebP file of pixels (H, W, 3 or 4), exactly them if it is `lossless`."""
    height, width, _ = pixels.shape
    check_sides(width, height, "image/webp")
    file = io.BytesIO()
    settings = {"lossless": True, "exact": True} if lossless else {"quality": DEFAULT_QUALITY}
    Image.fromarray(pixels).save(file, "WEBP", **settings, **_SETTINGS["WEBP"])
    return file.getvalue()


def flattened(pixels: npt.NDArray[np.uint8], background: Colour) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 4) over a background: (H, W, 3); as they are where they have no alpha."""
    return pixels if pixels.shape[2] == 3 else np.array(_over(Image.fromarray(pixels), background))


def opaque(pixels: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) in so many channels: a fourth is 255 throughout."""
    return np.pad(pixels, ((0, 0), (0, 0), (0, channels - 3)), constant_values=255) if channels > 3 else pixels


def check_sides(width: int, height: int, media_type: str) -> None:
    """Raises NotAcceptable where a picture of so many pixels a side is over the format's limit."""
    _, longest = _LOSSY.get(media_type, (None, None))
    if longest is not None and max(width, height) > longest:
        raise NotAcceptable(f"{media_type} ends at {longest} pixels a side, the picture has {width}x{height}")


def _decode(body: Body, header: PictureHeader) -> Image.Image:
    view = memoryview(body)
    parts = [memoryview(part) if isinstance(part, bytes) else view[part] for part in header.kept]
    if header.format == "PNG":
        check_chunks(parts[1:])
    file = io.BytesIO(b"".join(parts))
    try:
        image = _PLUGINS[header.format](file)
        if image.size != (header.width, header.height):  # before load(): this is what max_pixels was checked on
            raise MalformedBody(f"the {header.format} file states two different sizes")
        image.load()
    except Image.DecompressionBombError as error:  # Pillow's own limit, on WebP alone
        raise TooLarge(f"a WebP file of {header.width}x{header.height} pixels is not decoded") from error
    except _DECODE_ERRORS as error:
        raise _corrupt(header, error) from error
    return image


def _corrupt(header: PictureHeader, error: Exception) -> MalformedBody:
    return MalformedBody(f"the {header.format} file is truncated or corrupt: {str(error)[:100]}")


def _split(image: Image.Image, gamma: float | None) -> tuple[Image.Image, Image.Image | None, float | None]:
    """The picture as L, RGB or CMYK, 8 bits each; its alpha as L where it has one; the gamma that it still has."""
    key = image.info.get("transparency")
    if image.mode == "I;16":  # Pillow's convert clips at 255
        deep = np.asarray(image).astype(np.uint32)
        alpha = None if key is None else Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8))
        grey = ((deep * 255 + 32767) // 65535).astype(np.uint8) if gamma is None else curve(gamma, 65536)[deep]
        return Image.fromarray(grey), alpha, None
    if key is not None:
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    return image.convert(_OPAQUE[image.mode]), alpha, gamma


def _over(image: Image.Image, background: Colour) -> Image.Image:
    """An RGBA picture over a colour, as RGB."""
    below = Image.new("RGB", image.size, background)
    below.paste(image, mask=image.getchannel("A"))
    return below
