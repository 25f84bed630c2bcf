"""Whole folders through /encode and /decode: of a running service, or of the same app inside this process."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import ValidationError
from tqdm import tqdm

from app.api.schemas import Problem
from app.errors import InvalidInput, ServiceError
from app.main import create_app
from app.settings import Settings

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
LATENTS = frozenset({".npy", ".npz", ".safetensors"})
AT_ONCE = 4  # requests in flight: one computes while others are read and written
AGAIN = 5  # times that a request is repeated after a 429
LONGEST = 60.0  # seconds that a Retry-After may make us wait


def send_files(
    op: Literal["encode", "decode"],
    inputs: list[Path],
    output: Path,
    query: dict[str, Any],
    settings: Settings,
    *,
    url: str | None,
    key: str | None,
    resume: bool,
) -> int:
    """Encodes pictures to .npy or decodes latents to .png, one file each; 0, or 1 when any of them failed.

    Raises InvalidInput, as `walk` and for an address that is none.
    """
    suffixes, suffix = (PICTURES, ".npy") if op == "encode" else (LATENTS, ".png")
    work = [(source, output / target) for source, target in walk(inputs, suffixes, suffix)]
    if resume:
        work = [(source, target) for source, target in work if not target.exists()]
    if not work:
        return 0
    return asyncio.run(_send(op, work, query, settings.model_copy(update={"api_keys": None}), url, key))


def walk(inputs: list[Path], suffixes: frozenset[str], suffix: str) -> list[tuple[Path, Path]]:
    """(file, relative output path) of each input; folders are walked and keep their layout.

    Raises InvalidInput when there is nothing to do, or two inputs would be written to one file.
    """
    found: list[tuple[Path, Path]] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            found += [(file, file.relative_to(path).with_suffix(suffix)) for file in inside]
        else:
            found.append((path, Path(path.name).with_suffix(suffix)))
    targets = [target for _, target in found]
    if twice := sorted({str(target) for target in targets if targets.count(target) > 1}):
        raise InvalidInput(f"several inputs would be written to {', '.join(twice[:3])}: give them different names")
    if not found:
        raise InvalidInput(f"no files of {', '.join(sorted(suffixes))} in {', '.join(map(str, inputs))}")
    return found


async def _send(
    op: str, work: list[tuple[Path, Path]], query: dict[str, Any], settings: Settings, url: str | None, key: str | None
) -> int:
    room = asyncio.Semaphore(AT_ONCE)
    failures = 0
    async with connect(url, key, settings) as client:
        with tqdm(total=len(work), unit="file", disable=None) as bar:

            async def one(source: Path, target: Path) -> None:
                nonlocal failures
                async with room:
                    try:
                        await _convert(client, op, query, source, target)
                    except (ServiceError, OSError, httpx.HTTPError) as error:
                        failures += 1
                        reason = " ".join(str(error).split()) or type(error).__name__
                        tqdm.write(f"latentd: {source}: {reason}", file=sys.stderr)
                    bar.update()

            await asyncio.gather(*(one(source, target) for source, target in work))
    return 1 if failures else 0


@asynccontextmanager
async def connect(url: str | None, key: str | None, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service at `url`, or else of one inside this process. Raises InvalidInput for no address."""
    if url is not None:
        headers = {b"Authorization": b"Bearer " + key.encode(errors="surrogateescape")} if key else {}
        try:
            remote = httpx.AsyncClient(base_url=url, headers=headers, timeout=None)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise InvalidInput(f"cannot use --url {url}: {error}") from None
        async with remote as client:
            yield client
        return
    app = create_app(settings)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://latentd", timeout=None) as client,
    ):
        await app.state.context.engine.first_scan()  # however large the folder
        yield client


async def _convert(client: httpx.AsyncClient, op: str, query: dict[str, Any], source: Path, target: Path) -> None:
    media = "application/x-npy" if op == "encode" else "image/png"
    content = await asyncio.to_thread(source.read_bytes)
    response = await post(client, f"/{op}", params=query, content=content, headers={"Accept": media})
    content = content_of(response, media)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, content)


async def post(client: httpx.AsyncClient, path: str, **request: Any) -> httpx.Response:
    """The answer to a POST; where the queue is full, asked for again when the service says, at most AGAIN times."""
    response = await client.post(path, **request)
    for _ in range(AGAIN):
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            break
        await asyncio.sleep(_seconds(response.headers.get("retry-after", "")))
        response = await client.post(path, **request)
    return response


def _seconds(retry_after: str) -> float:
    """The header's seconds within bounds; a date, or nothing, is one second."""
    return min(float(retry_after), LONGEST) if retry_after.isascii() and retry_after.isdecimal() else 1.0


def content_of(response: httpx.Response, media: str) -> bytes:
    """The content of an answer of this type. Raises ServiceError, with the service's own reason if it gave one."""
    came = response.headers.get("content-type", "")
    if came == "application/problem+json":
        try:
            raise ServiceError(Problem.model_validate_json(response.content).detail)
        except ValidationError as error:
            raise ServiceError(f"HTTP {response.status_code} without a reason that can be read") from error
    if response.status_code != httpx.codes.OK or came != media:  # somebody else's service
        raise ServiceError(f"expected {media}, got HTTP {response.status_code} {came}")
    return response.content


def replace_file(target: Path, content: bytes) -> None:
    """Writes a file in one step; where that fails, nothing stays. Raises OSError, which names the target."""
    partial = target.with_name(f".{target.name}.part")  # --resume must never meet half a file
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        with suppress(OSError):  # moved, or never made
            partial.unlink()
