"""Files and whole folders through /encode and /decode: of a running service, or of the same app inside this process."""

import asyncio
import errno
import io
import sys
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import httpx

from app.engine.devices import device_names, torch_device
from app.errors import InvalidInput, ServiceError
from app.settings import Settings
from app.text import reason
from app.tools.manifest import Made, Maker, Manifest
from app.tools.paths import DECODE, ENCODE, Found, Item, find, listed, named
from app.tools.progress import Progress
from app.tools.service import connect, content_of, model_of, post, replace_file, systemic
from app.wire.arrays import latent_shape
from app.wire.headers import read_header

ZIP = "application/zip"

AT_ONCE = 128
"""Files in flight at most; the two below are what usually bounds them."""

BATCHES = 2
"""So many batches of pixels are in flight: one is computed while another gathers."""

CPU_PIXELS = 1 << 18
"""In flight where this process computes on a CPU, whose caches hold no more: 64 pictures of 256 x 256 took 10.2 s of
its time in one batch, 9.3 s in batches of 16 and 7.0 s in batches of 4 or one by one (latentd-small, two cores)."""

LEAST = 4
"""Pictures in flight, however large: one is computed while others are read and written."""

BYTES = 256 << 20
"""Of the files in flight; a larger one goes alone."""


Existing = Literal["refuse", "skip", "replace"]
"""What becomes of targets that are there."""


@dataclass(frozen=True)
class Errand:
    """What is asked of encode or decode."""

    op: str
    query: dict[str, Any]
    existing: Existing
    url: str | None
    key: str | None
    settings: Settings


@dataclass
class Tally:
    """What came of the files."""

    done: list[Item] = field(default_factory=list)  # written; by several threads
    failed: int = 0
    skipped: int = 0  # as they exist
    warnings: set[str] = field(default_factory=set)  # that were said

    def summary(self, passed_over: str) -> str:
        """One line."""
        more = f"; not read: {passed_over}" if passed_over else ""
        return f"{len(self.done)} done, {self.failed} failed, {self.skipped} skipped{more}"


class Stop(ServiceError):
    """What would fail every other file too."""


class Room:
    """So much of something in flight at once, in `least` pieces at any rate: what is more than all of it goes too."""

    def __init__(self, limit: int, least: int = 1) -> None:
        self._limit = limit
        self._least = least
        self._taken = self._pieces = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def of(self, amount: int) -> AsyncIterator[None]:
        """Waits for room, and holds it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces < self._least or self._taken + amount <= self._limit)
            self._taken += amount
            self._pieces += 1
        try:
            yield
        finally:
            self._taken -= amount
            self._pieces -= 1
            async with self._changed:
                self._changed.notify_all()


def send_files(errand: Errand, inputs: list[str], output: str) -> int:
    """Encodes pictures or decodes latents, one file each; 0, or 1 when any of them failed.

    Raises InvalidInput, as `find`, for targets that exist and for an address that is none; ServiceError and
    httpx.HTTPError where nothing can be done at all.
    """
    found = find(inputs, output, ENCODE if errand.op == "encode" else DECODE)
    there = [item for item in found.items if item.target is not None and _exists(item.target, errand.op)]
    if there and errand.existing == "refuse":
        names = named([str(item.target) for item in there])
        raise InvalidInput(f"{names} exist{'s' * (len(there) == 1)}: --resume skips what exists, --force replaces it")
    tally = Tally()
    try:
        asyncio.run(_all(errand, found, there, tally))
    except httpx.HTTPError as error:
        raise ServiceError(f"{errand.url}: {reason(error)}") from error
    finally:
        told = listed(found.passed_over)
        if (len(found.items) > 1 or told) and (tally.done or tally.failed or tally.skipped):
            sys.stderr.write(f"latentd: {tally.summary(told)}\n")
    return 1 if tally.failed else 0


def _exists(target: Path, op: str) -> bool:
    return target.exists() or (op == "decode" and _part(target, 0).exists())


def _part(target: Path, index: int) -> Path:
    """Of a file with several pictures, the file of one."""
    return target.with_name(f"{target.stem}-{index:04}{target.suffix}")


async def _all(errand: Errand, found: Found, there: list[Item], tally: Tally) -> None:
    """Every file; the first error that the others would meet too ends it. Raises that one."""
    async with connect(errand.url, errand.key, errand.settings) as client:
        row = await model_of(client, errand.query.get("model"))
        options = {name: value for name, value in errand.query.items() if name != "model"}
        told = (row.name, row.sha256 or "", row.family or "", row.family_source or "")
        run = _Run(errand, found, tally, client, Maker(errand.op, *told, options), row.spatial_factor or 1)
        items = run.left(there)
        files = asyncio.Semaphore(min(AT_ONCE, errand.settings.queue_size))
        with Progress(len(items)) as progress:

            async def one(item: Item) -> None:
                try:
                    await run.convert(item, progress.say)
                except (ServiceError, OSError, httpx.HTTPError) as error:
                    if isinstance(error, Stop) or systemic(error):
                        raise Stop(f"{item.name}: {reason(error)}") from error
                    tally.failed += 1
                    progress.say(f"{item.name}: {reason(error)}")
                finally:
                    files.release()
                progress.step()

            try:
                async with asyncio.TaskGroup() as group:
                    for item in items:
                        await files.acquire()
                        group.create_task(one(item))
            except ExceptionGroup as errors:
                stops, bugs = errors.split(Stop)
                if bugs is not None or stops is None:
                    raise
                raise stops.exceptions[0] from None


class _Run:
    """One errand on its way."""

    def __init__(
        self, errand: Errand, found: Found, tally: Tally, client: httpx.AsyncClient, maker: Maker, side: int
    ) -> None:
        self._errand, self._folder, self._tally = errand, found.folder, tally
        self._items = found.items
        self._kind = ENCODE if errand.op == "encode" else DECODE
        self._client = client
        self._maker = maker
        self._side = side  # pixels per position of a raw latent
        self._manifest = Manifest(found.folder) if found.folder is not None else None
        self._noted: dict[Path, Manifest] = {}  # of the folders that files come from
        self._bytes = Room(BYTES)
        self._pixels = Room(_pixels_at_once(errand), LEAST)

    def left(self, there: list[Item]) -> list[Item]:
        """What is to be made. Raises InvalidInput where what is there was made by another model or other options."""
        if self._errand.existing != "skip":
            return list(self._items)
        self._tally.skipped = len(there)
        unknown = 0
        for item in there:
            made = self._made(item)
            unknown += made is None
            if made is not None and made.maker.id != self._maker.id:
                raise InvalidInput(
                    f"{item.target} was made by {made.maker}, and this would be {self._maker}: resume with the same, "
                    "choose another folder, or replace all with --force"
                )
        if unknown and self._manifest is not None:
            sys.stderr.write(f"latentd: warning: nothing says what made {unknown} of the files that exist\n")
        skipped = {item.target for item in there}
        return [item for item in self._items if item.target not in skipped]

    def _made(self, item: Item) -> Made | None:
        if self._manifest is None or self._folder is None or item.target is None:
            return None
        target = item.target if item.target.exists() else _part(item.target, 0)
        return self._manifest.made(target.relative_to(self._folder).as_posix())

    async def convert(self, item: Item, say: Callable[[str], None]) -> None:
        """Reads, sends and writes one file. Raises Stop, ServiceError, OSError and httpx.HTTPError."""
        async with self._bytes.of(await asyncio.to_thread(_size, item.source)):
            body = await asyncio.to_thread(_read, item.source)
            pictures, pixels = await asyncio.to_thread(self._measure, body)
            media = self._media(item, pictures)
            query, headers = self._as_noted(item)
            async with self._pixels.of(pixels):
                headers["Accept"] = media
                answer = await post(self._client, f"/{self._errand.op}", params=query, content=body, headers=headers)
        content = content_of(answer, media)
        if (came := answer.headers.get("x-model-sha256", "")) != self._maker.sha256:
            began = self._maker.sha256[:10]
            raise Stop(f"the model was replaced meanwhile: it began with sha256 {began}, and {came[:10]} answered")
        warning = unquote(answer.headers.get("x-warning", ""))
        if warning and warning not in self._tally.warnings:
            self._tally.warnings.add(warning)
            say(f"warning: {warning}")
        original = answer.headers.get("x-image-size") if self._errand.op == "encode" else None
        await asyncio.to_thread(self._write, item, content, media, original)

    def _measure(self, body: bytes) -> tuple[int, int]:
        """(pictures, pixels) of a file by its header; what cannot be read is the service's to refuse."""
        try:
            if self._errand.op == "encode":
                width, height = read_header(body).shown
                return 1, width * height
            shape = latent_shape(body)
            return shape.batch, sum(n * height * width for n, _, height, width in shape.parts) * self._side**2
        except ServiceError:
            return 1, 0

    def _media(self, item: Item, pictures: int) -> str:
        """The type to ask for."""
        if item.target is None or self._folder is not None:
            return ZIP if pictures > 1 else self._kind.media[self._kind.usual]
        media = self._kind.media[item.target.suffix.lower()]
        if pictures > 1 and media != ZIP:
            raise InvalidInput(f"it holds {pictures} pictures, which {item.target.name} cannot: -o a folder or a .zip")
        return media

    def _as_noted(self, item: Item) -> tuple[dict[str, Any], dict[str, str]]:
        """(query, headers): what was asked for, and of latents that `encode` made what it noted beside them."""
        query, headers = dict(self._errand.query), dict[str, str]()
        if self._errand.op == "encode" or item.home is None:
            return query, headers
        noted = self._noted.get(item.home) or self._noted.setdefault(item.home, Manifest(item.home))
        made = noted.made(Path(item.inside).as_posix())
        if made is None or made.maker.op != "encode":
            return query, headers
        options = made.maker.options
        query.setdefault("latents", options.get("latents", "scaled"))
        if made.size is not None and options.get("fit", "pad") == "pad":
            query.setdefault("size", made.size)
        if made.maker.family_source != "default":  # a guess is not held against a model
            headers["X-Latents-Family"] = made.maker.family
        return query, headers

    def _write(self, item: Item, content: bytes, media: str, original: str | None) -> None:
        target = item.target
        if target is None:
            sys.stdout.buffer.write(content)
            return
        files = {target: content}
        if media == ZIP and target.suffix.lower() != ".zip":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                parts = [archive.read(name) for name in archive.namelist()]
            # The first comes last: where it is there, all are.
            files = {_part(target, index): part for index, part in reversed(list(enumerate(parts)))}
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, part in files.items():
            if self._errand.existing != "replace" and path.exists():
                raise FileExistsError(errno.EEXIST, "has come meanwhile", str(path))
            replace_file(path, part)
            if self._manifest is not None and self._folder is not None:
                self._manifest.note(path.relative_to(self._folder).as_posix(), self._maker, original)
        self._tally.done.append(item)  # here, as it is true for a thread that an interrupt leaves behind


def _pixels_at_once(errand: Errand) -> int:
    settings = errand.settings
    most = min(BATCHES * settings.batch_pixels, settings.queue_pixels)
    here = errand.url is None and all(torch_device(name).type == "cpu" for name in device_names(settings.devices))
    return min(most, CPU_PIXELS) if here else most


def _size(source: Path | None) -> int:
    return 0 if source is None else source.stat().st_size


def _read(source: Path | None) -> bytes:
    return sys.stdin.buffer.read() if source is None else source.read_bytes()
