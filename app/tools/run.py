"""One errand on its way: a file is read, made ready, sent, and what comes back is written, in threads and in bounds."""

import asyncio
import errno
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import httpx
import numpy as np

from app.errors import InvalidInput, InvalidLatent, ServiceError
from app.tools import kohya
from app.tools.errand import Errand, pixels_at_once
from app.tools.manifest import Made, Maker, Manifest
from app.tools.order import by_size
from app.tools.paths import Found, Item, Kind
from app.tools.pictures import Ready, ready, weight
from app.tools.room import Room
from app.tools.service import ANSWER_BYTES, PIXEL_BYTES, content_of, post, replace_file
from app.tools.summary import Tally
from app.tools.targets import part, twin
from app.wire.arrays.latents import latent_shape, read_latents
from app.wire.arrays.npy import write_npy
from app.wire.arrays.npz import read_zip
from app.wire.arrays.spec import CLIPS
from app.wire.headers import PictureHeader, read_header
from app.wire.png import write_png

T = TypeVar("T")

ZIP = "application/zip"
FILMS = ("image/apng", "image/webp", "video/mp4", "video/webm", "video/x-matroska")
"""May hold a clip, which looks like several pictures to those who do not know the model: the service does."""

LEAST = 4
"""Pictures in flight, however large: one is computed while others are read and written."""

BYTES = 256 << 20
"""Of the files in flight, and again of pictures that are made ready; a larger one goes alone."""

DECODING = 2 << 30
"""Bytes of memory in which pictures are decoded ahead."""


class Stop(ServiceError):
    """What would fail every other file too."""


class Run:
    """What the files of one errand share."""

    def __init__(
        self,
        errand: Errand,
        found: Found,
        kind: Kind,
        tally: Tally,
        client: httpx.AsyncClient,
        maker: Maker,
        side: int,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._errand, self._folder, self._tally, self._kind = errand, found.folder, tally, kind
        self._items = found.items
        self._client = client
        self._maker = maker
        self._side = side  # pixels per position of a raw latent
        self._write_pixels = write_npy if errand.url is None else write_png  # a network is slower than deflating
        self._form = kohya.form_of(maker.family) if errand.wish.form == "kohya" else None
        self._manifest = Manifest(found.folder) if found.folder is not None else None
        self._noted: dict[Path, Manifest] = {}  # of the folders that files come from
        self._threads = threads
        # Taken in this order, so that nobody waits for one who waits for him.
        self._bytes, self._ready = Room(BYTES), Room(BYTES)
        self._decoding = Room(DECODING)
        self._pixels = Room(pixels_at_once(errand), LEAST)

    def in_thread(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Of the command's own."""
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def in_order(self, items: list[Item]) -> AsyncGenerator[Item]:
        """Pictures as they batch: those of one size follow each other."""
        if self._errand.op == "encode" and len(items) > 1:
            async with aclosing(by_size(items, self._errand.wish.size, self.in_thread)) as ordered:
                async for item in ordered:
                    yield item
            return
        for item in items:
            yield item

    def left(self, there: Mapping[Path, Path]) -> list[Item]:
        """What is to be made. Raises InvalidInput where what is there was made by another model or other options."""
        if self._errand.existing != "skip":
            return list(self._items)
        self._tally.skipped = len(there)
        unknown = 0
        for path in there.values():
            made = self._made(path)
            unknown += made is None
            if made is not None and made.maker.id != self._maker.id:
                raise InvalidInput(
                    f"{path} was made by {made.maker}, and this would be {self._maker}: resume with the same, "
                    "choose another folder, or replace all with --force"
                )
        if unknown and self._manifest is not None:
            sys.stderr.write(f"latentd: warning: nothing says what made {unknown} of the files that exist\n")
        return [item for item in self._items if item.target not in there]

    def _made(self, path: Path) -> Made | None:
        if self._manifest is None or self._folder is None:
            return None
        return self._manifest.made(path.relative_to(self._folder).as_posix())

    async def convert(self, item: Item, say: Callable[[str], None]) -> None:
        """Reads, sends and writes one file. Raises Stop, ServiceError, OSError and httpx.HTTPError."""
        async with self._bytes.of(await self.in_thread(_size, item.source)):
            body = await self.in_thread(_read, item.source)
            header = await self.in_thread(self._header, body)
            pictures, pixels = (1, 0) if header else await self.in_thread(self._latents, body)
            media = self._media(item, pictures)
            query, headers = self._as_noted(item)
            async with self._ready.of(weight(header, self._errand.wish) if header else 0):
                sent = Ready([body], pixels)
                if header is not None:
                    if header.frames > 1 and self._errand.wish.changes:  # else the service sees it, and says the same
                        self._warn(f"the picture has {header.frames} frames: the first is encoded", say)
                    async with self._decoding.of(header.work if self._errand.wish.changes else 0):
                        sent = await self.in_thread(
                            ready, body, self._errand.wish, self._errand.settings.max_pixels, self._write_pixels
                        )
                headers["Accept"] = media
                async with self._pixels.of(sent.pixels):
                    path, most = f"/{self._errand.op}", ANSWER_BYTES + PIXEL_BYTES * sent.pixels
                    asked = (
                        post(self._client, path, most=most, params=query, content=each, headers=headers)
                        for each in sent.bodies
                    )
                    answers = await asyncio.gather(*asked)
        contents = [self._content(answer, media, say) for answer in answers]
        original = answers[0].headers.get("x-image-size") if self._errand.op == "encode" else None
        await self.in_thread(self._write, item, contents, media, original, sent)

    def _content(self, answer: httpx.Response, media: str, say: Callable[[str], None]) -> bytes:
        content = content_of(answer, media)
        if (came := answer.headers.get("x-model-sha256", "")) != self._maker.sha256:
            began = self._maker.sha256[:10]
            raise Stop(f"the model was replaced meanwhile: it began with sha256 {began}, and {came[:10]} answered")
        warning = unquote(answer.headers.get("x-warning", ""))
        if warning:
            self._warn(warning, say)
        return content

    def _warn(self, warning: str, say: Callable[[str], None]) -> None:
        """Once, however many files it is true of."""
        if warning not in self._tally.warnings:
            self._tally.warnings.add(warning)
            say(f"warning: {warning}")

    def _header(self, body: bytes) -> PictureHeader | None:
        """Of a picture; what cannot be read is the service's to refuse, or ours where we have to change it."""
        if self._errand.op == "decode":
            return None
        try:
            return read_header(body)
        except ServiceError:
            if self._errand.wish.changes:
                raise
            return None

    def _latents(self, body: bytes) -> tuple[int, int]:
        """(pictures, pixels) of a file by its header; what cannot be read is the service's to refuse."""
        if self._errand.op == "encode":
            return 1, 0
        try:
            shape = latent_shape(body, CLIPS)
        except ServiceError:
            return 1, 0
        return shape.batch, sum(n * height * width for n, _, height, width in shape.parts) * self._side**2

    def _media(self, item: Item, pictures: int) -> str:
        """The type to ask for."""
        if item.target is None or self._folder is not None:
            return ZIP if pictures > 1 else self._kind.media[self._kind.usual]
        media = self._kind.media[item.target.suffix.lower()]
        if pictures > 1 and media not in (ZIP, *FILMS):
            raise InvalidInput(f"it holds {pictures} pictures, which {item.target.name} cannot: -o a folder or a .zip")
        return media

    def _as_noted(self, item: Item) -> tuple[dict[str, Any], dict[str, str]]:
        """(query, headers): what was asked for, and of latents that `encode` made what it noted beside them."""
        query, headers = dict(self._errand.query), dict[str, str]()
        if self._errand.op == "encode":
            if self._form is not None:
                query["latents"] = self._form.convention
            if self._errand.wish.buckets is not None:
                query["fit"] = "error"  # a bucket's size is what was asked for
            return query, headers
        if item.home is None:
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

    def _write(self, item: Item, contents: list[bytes], media: str, original: str | None, sent: Ready) -> None:
        latents = [self._finite(content) for content in contents] if self._errand.op == "encode" else []
        if item.target is None:
            sys.stdout.buffer.write(contents[0])
            return
        files = dict(self._files(item.target, contents, media, latents, sent))
        item.target.parent.mkdir(parents=True, exist_ok=True)
        more = {}
        if sent.cut is not None:
            cut = sent.cut
            more = {"original": _text(cut.original), "resized": _text(cut.resized), "crop": list(cut.box)}
        replaces = self._errand.existing == "replace"
        for path in files:
            if not replaces and path.exists() and not self._left_behind(path):
                raise FileExistsError(errno.EEXIST, "has come meanwhile", str(path))
        for path, content in files.items():
            if not replaces:  # noted first: whatever kills us, a file that is there is one that is known
                self._note(path, original, more)
            replace_file(path, content)
            if replaces:  # an old file stays the old one's until it is gone
                self._note(path, original, more)
        if sent.cut is not None:
            self._tally.sizes[sent.cut.bucket] += 1
        self._tally.done.append(item)  # here, as it is true for a thread that an interrupt leaves behind

    def _left_behind(self, path: Path) -> bool:
        """Whether it is of an errand like this one that ended before all of its input's files were there."""
        made = self._made(path)
        return self._errand.existing == "skip" and made is not None and made.maker.id == self._maker.id

    def _note(self, path: Path, original: str | None, more: Mapping[str, Any]) -> None:
        if self._manifest is not None and self._folder is not None:
            self._manifest.note(path.relative_to(self._folder).as_posix(), self._maker, original, more)

    def _files(
        self, target: Path, contents: list[bytes], media: str, latents: list[Any], sent: Ready
    ) -> Iterator[tuple[Path, bytes]]:
        """What is written where. The file that shows that all are there comes last."""
        if self._form is not None and sent.cut is not None:
            flipped = latents[1] if len(latents) > 1 else None
            name = kohya.file_name(target.stem, sent.cut.original, self._form)
            yield target.with_name(name), kohya.write(self._form, latents[0], flipped, sent.cut)
        elif media == ZIP and target.suffix.lower() != ".zip":
            parts = read_zip(contents[0], ANSWER_BYTES + PIXEL_BYTES * sent.pixels).values()
            for index, content in reversed(list(enumerate(parts))):
                yield part(target, index), content
        else:
            for content in contents[1:]:
                yield twin(target), content
            yield target, contents[0]

    def _finite(self, content: bytes) -> Any:
        """The latent (C, h, w) of an answer, or a clip's (C, T, h, w). Raises InvalidLatent for none, NaN among it."""
        found = read_latents(content, max_bytes=len(content), purpose=CLIPS).items
        if latent_shape(content, CLIPS).clip:
            return np.stack(found)
        if len(found) != 1:
            raise InvalidLatent(f"expected one latent for a picture, got {len(found)}")
        return found[0]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _size(source: Path | None) -> int:
    return 0 if source is None else source.stat().st_size


def _read(source: Path | None) -> bytes:
    return sys.stdin.buffer.read() if source is None else source.read_bytes()
