"""Downloads the published autoencoders of the known table from the Hugging Face hub: resumed, verified, then visible.

URLs: huggingface.co/docs/hub, "Downloading models": {base}/{repo}/resolve/{revision}/{file}.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import httpx
from tqdm import tqdm

from app.errors import InvalidParameter, ServiceError
from app.store.known import Known, fetchable, named
from app.store.tree import ROOTS
from app.weights.files import SUFFIXES, open_regular

HUB = "https://huggingface.co"
REVISION = "main"  # a file is what its sha256 says, whichever commit it comes from
TIMEOUT = httpx.Timeout(60, connect=15)  # seconds without a byte
LARGEST = 2 << 30  # bytes of a file whose size the table does not know: Sana's has 1.25e9


@dataclass(frozen=True)
class Fetched:
    """A file of the table, where it lies now."""

    path: Path
    new: bool  # False: it was there already


def fetch(name: str, models: Path, base_url: str, token: str | None = None, *, force: bool = False) -> list[Fetched]:
    """Brings the file of this name, or both halves of a pair, into `models`/VAE.

    What is there already and has the right hash stays. Raises UnknownModel, InvalidParameter for a name that is taken
    by another file, ServiceError, and OSError.
    """
    rows = named(name)
    folder = place_in(models)
    folder.mkdir(parents=True, exist_ok=True)
    headers = {"Accept-Encoding": "identity"}  # ranges count the file's own bytes
    if token:
        if not (token.isascii() and token.isprintable()):  # httpx would print it
            raise InvalidParameter("HF_TOKEN is no token: expected printable ASCII in one line")
        headers["Authorization"] = f"Bearer {token}"  # httpx drops it where a redirect leaves the host
    try:
        with httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True) as client:
            return [_fetch_one(client, row, folder, base_url.rstrip("/"), force) for row in rows]
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InvalidParameter(f"cannot use {base_url} as the hub's address: {error}") from None


def listing() -> list[str]:
    """One line for each name that `fetch` takes."""
    lines = []
    for name, rows in fetchable().items():
        size = sum(row.bytes or 0 for row in rows) / 1e6 if all(row.bytes for row in rows) else None
        others = sorted({other for row in rows for other in row.names[1:]})
        cells = (name.ljust(30), rows[0].family.ljust(12), f"{size:7.1f} MB" if size else "-".rjust(10))
        fp16, repo = f"fp16 {rows[0].fp16}".ljust(14), (rows[0].repo or "").ljust(50)
        lines.append("  ".join((*cells, fp16, repo, ", ".join(others))).rstrip())
    return lines


def place_in(models: Path) -> Path:
    """Where a VAE goes in a models folder: `VAE` in any case; the folder itself where weights lie there flat."""
    inside = sorted(models.iterdir()) if models.is_dir() else []
    roots = [path for path in inside if path.name.lower() in ROOTS and path.is_dir()]
    if place := next((path for path in roots if path.name.lower() == "vae"), None):
        return place
    flat = not roots and any(path.suffix.lower() in SUFFIXES for path in inside)
    return models if flat else models / "VAE"


def _fetch_one(client: httpx.Client, row: Known, folder: Path, base: str, force: bool) -> Fetched:
    target = folder / row.save_as
    if target.exists():
        if (found := _sha256(target)) == row.sha256:
            return Fetched(target, new=False)
        if not force:
            raise InvalidParameter(
                f"{target} is another file: its sha256 is {found}, expected {row.sha256}; --force replaces it"
            )
    part = target.with_name(f".{target.name}.part")
    with _locked(part) as file:
        try:
            if row.bytes is None or file.seek(0, os.SEEK_END) != row.bytes:
                _download(client, f"{base}/{row.repo}/resolve/{REVISION}/{row.file}", row, file)
        except httpx.UnsupportedProtocol as error:
            raise InvalidParameter(f"cannot use {base} as the hub's address: {_reason(error)}") from error
        except (httpx.TransportError, KeyboardInterrupt) as error:
            kept = f"; {part} keeps {size} bytes, and the same command resumes" if (size := file.tell()) else ""
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else _reason(error)
            raise ServiceError(f"{row.save_as}: {reason}{kept}") from error
        except httpx.HTTPError as error:
            raise ServiceError(f"{row.save_as}: {_reason(error)}") from error
        except OSError as error:  # a full disk names no file by itself
            raise ServiceError(f"{part}: {error.strerror or error}, after {file.tell()} bytes") from error
        os.fsync(file.fileno())
        if (found := _sha256(part)) != row.sha256:
            part.unlink()
            raise ServiceError(f"{row.save_as}: sha256 is {found}, expected {row.sha256}; what had come was removed")
        part.replace(target)
    return Fetched(target, new=True)


@contextmanager
def _locked(part: Path) -> Iterator[FileIO]:
    """The partial file, ours alone. Raises ServiceError when another process is writing it."""
    with part.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"{part} is being written by another fetch") from None
        if not _is_at(part, file):
            raise ServiceError(f"{part} was finished by another fetch just now: try again")
        try:
            yield file
        finally:
            if _is_at(part, file) and file.seek(0, os.SEEK_END) == 0:
                part.unlink()


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _download(client: httpx.Client, url: str, row: Known, file: FileIO) -> None:
    """Appends what is missing to the file; begins anew where the server or the table says that it must."""
    have = file.seek(0, os.SEEK_END)
    limit = row.bytes or LARGEST
    if have > limit:
        have = file.truncate(0)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with client.stream("GET", url, headers=headers) as response:
        begin, total = _span(response)
        beyond = response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE
        if have and beyond and total == have:
            return  # all there; the hash decides
        elsewhere = response.status_code == httpx.codes.PARTIAL_CONTENT and begin != have
        if not (have and (beyond or elsewhere)):
            _check_answer(response, row, total, limit)
            if response.status_code == httpx.codes.OK:
                have = file.truncate(0)  # a server that does not know ranges sends all of it
            _append(response, row, file, have, total, limit)
            return
        file.truncate(0)
    _download(client, url, row, file)  # once: there is nothing to resume any more


def _append(response: httpx.Response, row: Known, file: FileIO, have: int, total: int | None, limit: int) -> None:
    with tqdm(total=row.bytes or total, initial=have, desc=row.save_as, unit="B", unit_scale=True, disable=None) as bar:
        for data in response.iter_raw():
            have += len(data)
            if have > limit:
                file.truncate(0)
                raise ServiceError(
                    f"{row.save_as}: more than the expected {limit} bytes came; what had come was removed"
                )
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            bar.update(len(data))
    if total is not None and have < total:
        raise httpx.ReadError(f"the connection ended after {have} of {total} bytes")


def _span(response: httpx.Response) -> tuple[int, int | None]:
    """(first byte that comes, bytes of the whole file) as the answer's headers say."""
    if match := re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("content-range", "")):
        return int(match[1] or 0), None if match[2] == "*" else int(match[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdecimal() else None


def _check_answer(response: httpx.Response, row: Known, total: int | None, limit: int) -> None:
    status, where = response.status_code, response.url.copy_with(query=None)
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServiceError(
            f"{row.save_as}: HTTP {status} from {where}: accept the licence of {row.repo} on the hub and set HF_TOKEN"
        )
    if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        raise ServiceError(f"{row.save_as}: expected HTTP 200, got {status} from {where}")
    if total is not None and (total > limit or row.bytes not in (None, total)):
        raise ServiceError(f"{row.save_as}: {where} has {total} bytes, expected {row.bytes or f'at most {limit}'}")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
