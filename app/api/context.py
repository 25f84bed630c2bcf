"""What the handlers share, handed over by the composition root; and the keys that open them."""

import hashlib
import hmac
from base64 import b64decode
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from app.api.door.room import Codecs, Room
from app.api.errors import Forbidden, Unauthorized
from app.api.keys import Keys
from app.api.streams import Streams
from app.api.uploads import Uploads
from app.engine.engine import Engine
from app.engine.previews import Previews
from app.errors import InvalidParameter, TooLarge
from app.metrics import Metrics


@dataclass(frozen=True)
class Limits:
    """What one request may bring: more could never be queued, however long its client waited."""

    body_bytes: int
    picture_pixels: int  # of each picture
    items: int
    pixels: int

    def check(self, sizes: Sequence[tuple[int, int]], times: int = 1) -> None:
        """Raises TooLarge for pictures of these sizes (width, height), so many `times`: too large, too many or both.

        What a header claims is a number here; nothing of that length is made before this.
        """
        for width, height in sizes:
            if width * height > self.picture_pixels:
                raise TooLarge(
                    f"{width}x{height} are {width * height} pixels; at most {self.picture_pixels} are accepted"
                )
        self.check_items(len(sizes) * times)
        if (total := times * sum(width * height for width, height in sizes)) > self.pixels:
            raise TooLarge(f"{total} pixels in one request; at most {self.pixels} are accepted")

    def check_clip(self, size: tuple[int, int], frames: int) -> None:
        """Raises TooLarge for so many frames of a size (width, height): each too large, or all together."""
        self.check([size])
        if (total := frames * size[0] * size[1]) > self.pixels:
            raise TooLarge(
                f"{frames} frames of {size[0]}x{size[1]} are {total} pixels; at most {self.pixels} are accepted"
            )

    def check_items(self, count: int) -> None:
        """Raises TooLarge for more pictures than a request may bring."""
        if count > self.items:
            raise TooLarge(f"{count} pictures in one request; at most {self.items} are accepted")


@dataclass(frozen=True)
class Context:
    """Built once by `main.create_app`."""

    engine: Engine
    metrics: Metrics
    limits: Limits
    room: Room
    codecs: Codecs
    uploads: Uploads
    previews: Previews
    streams: Streams
    sketches: Codecs  # the one thread that previews have
    api_keys: Keys
    admin_keys: Keys
    metrics_public: bool = True


# All of these are coroutines: FastAPI would run functions in a pool of threads, and health with them.


async def context(request: Request) -> Context:
    """The app's context."""
    return cast(Context, request.app.state.context)


Shared = Annotated[Context, Depends(context)]

# Says in the OpenAPI document that a key may be needed; the functions below read the header themselves.
BEARER = HTTPBearer(auto_error=False, description="An API key; as the password of Basic it is taken too.")


async def require_key(request: Request, shared: Shared) -> None:
    """Lets a request pass that brings an API key or the admin key, or any request where no API keys are set."""
    check_key(request, await shared.api_keys.current(), await shared.admin_keys.current())


def check_key(request: Request, api_keys: frozenset[str], admin_keys: frozenset[str]) -> None:
    """As `require_key`. Raises Unauthorized and Forbidden."""
    if not api_keys:
        return
    given = _given(request)
    if given is None:
        raise Unauthorized("a key is needed: Authorization: Bearer KEY, or KEY as the password of Basic")
    if not _any(given, api_keys | admin_keys):
        raise Forbidden("this key is not known")


async def require_admin(request: Request, shared: Shared) -> None:
    """Lets a request pass that brings the admin key."""
    keys = await shared.admin_keys.current()
    if not keys:
        raise Forbidden("admin routes are off: set LATENTD_ADMIN_KEY or LATENTD_ADMIN_KEY_FILE to use them")
    given = _given(request)
    if given is None:
        raise Unauthorized("the admin key is needed: Authorization: Bearer KEY")
    if not _any(given, keys):
        raise Forbidden("this is not the admin key")


async def require_metrics_key(request: Request, shared: Shared) -> None:
    """As `require_key`, unless the metrics are public."""
    if not shared.metrics_public:
        await require_key(request, shared)


async def each_once(request: Request) -> None:
    """Refuses a query that says one thing twice."""
    names = Counter(name for name, _ in request.query_params.multi_items())
    if twice := sorted(name for name, times in names.items() if times > 1):
        raise InvalidParameter(f"given more than once: {', '.join(twice)[:200]}")


KEYED = [Depends(BEARER), Depends(require_key)]
GUARD = [*KEYED, Depends(each_once)]
ADMIN = [Depends(BEARER), Depends(require_admin), Depends(each_once)]


def _given(request: Request) -> bytes | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # the bytes of the header
    if scheme.lower() == "basic":
        try:
            return b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return None
    return None


def _any(given: bytes, keys: Iterable[str]) -> bool:
    matches = [_same(given, key) for key in keys]  # every key is compared, whichever fits
    return any(matches)


def _same(given: bytes, key: str) -> bool:
    """Constant-time equality, of hashes so that the lengths do not show either."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(key.encode()).digest())
