"""Files and whole folders through /encode and /decode: of a running service, or of the same app inside this process."""

import asyncio
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx

from app.errors import InvalidInput, ServiceError
from app.text import reason
from app.tools import kohya
from app.tools.errand import Errand
from app.tools.manifest import Maker
from app.tools.paths import DECODE, ENCODE, Found, Item, Kind, find, named
from app.tools.progress import Progress
from app.tools.run import Run, Stop
from app.tools.service import connect, model_of, replace_file, systemic
from app.tools.summary import Tally
from app.tools.targets import cached, check_twins, present
from app.vae.families import FAMILIES

AT_ONCE = 128
"""Requests in flight at most; their bytes and pixels are what usually bounds them."""

NPY = "application/x-npy"


def send_files(errand: Errand, inputs: list[str], output: str) -> int:
    """Encodes pictures or decodes latents, one file each; 0, or 1 when any of them failed.

    Raises InvalidInput, as `find`, for targets that exist and for an address that is none; ServiceError and
    httpx.HTTPError where nothing can be done at all.
    """
    kind = _kind(errand)
    found = find(inputs, output, kind)
    _check(errand, found, kind, output)
    tally = Tally(len(found.items), found.passed_over)
    try:
        there: Mapping[Path, Path] = {}
        if errand.wish.form != "kohya":  # its names tell the family, which the model must say
            there = _unless_refused(errand, present(found.items, errand.op))
        asyncio.run(_all(errand, found, kind, there, tally))
    except httpx.HTTPError as error:
        tally.ended = f"{errand.url}: {reason(error)}"
        raise ServiceError(tally.ended) from error
    except (ServiceError, OSError, KeyboardInterrupt) as error:
        tally.ended = "interrupted" if isinstance(error, KeyboardInterrupt) else reason(error)
        raise
    finally:
        if (len(found.items) > 1 or tally.passed_over) and tally.any:
            sys.stderr.write(f"latentd: {tally.line()}\n")
        if errand.summary is not None:
            replace_file(errand.summary, tally.json().encode())
    return 1 if tally.failed else 0


def _kind(errand: Errand) -> Kind:
    """What is read, and written into a folder."""
    if errand.op == "decode":
        return DECODE
    match errand.wish.form:
        case "kohya":
            return replace(ENCODE, media={".npz": NPY})
        case None:
            return ENCODE
        case form:
            return replace(ENCODE, media={f".{form}": ENCODE.media[f".{form}"]})


def _check(errand: Errand, found: Found, kind: Kind, output: str) -> None:
    """Raises InvalidInput for files that the wish cannot become."""
    if found.folder is None and errand.wish.form == "kohya":
        raise InvalidInput(f"--format kohya names its files itself: -o a folder, not {output}")
    if found.folder is not None and Path(output).suffix in ENCODE.media and Path(output).suffix not in kind.media:
        raise InvalidInput(f"-o {output} is not of --format {errand.wish.form}")
    if errand.wish.flip and errand.wish.form != "kohya":
        check_twins(found.items)


def _unless_refused(errand: Errand, there: Mapping[Path, Path]) -> Mapping[Path, Path]:
    """The targets that are there. Raises InvalidInput where they may neither be skipped nor replaced."""
    if there and errand.existing == "refuse":
        names = named([str(target) for target in there.values()])
        raise InvalidInput(f"{names} exist{'s' * (len(there) == 1)}: --resume skips what exists, --force replaces it")
    return there


async def _all(errand: Errand, found: Found, kind: Kind, there: Mapping[Path, Path], tally: Tally) -> None:
    """Every file; the first error that the others would meet too ends it. Raises that one."""
    threads = ThreadPoolExecutor(errand.workers or min(16, max(4, os.cpu_count() or 1)), "latentd-files")
    with threads:
        async with connect(errand.url, errand.key, errand.settings) as client:
            row = await model_of(client, errand.query.get("model"))
            _check_step(errand, row.family, row.spatial_factor or 1)
            options = {name: value for name, value in errand.query.items() if name != "model"} | errand.wish.options
            told = (row.name, row.sha256 or "", row.family or "", row.family_source or "")
            tally.maker = Maker(errand.op, *told, options)
            run = Run(errand, found, kind, tally, client, tally.maker, row.spatial_factor or 1, threads)
            if errand.wish.form == "kohya" and found.folder is not None:
                there = _unless_refused(errand, cached(found.items, found.folder, kohya.form_of(row.family)))
            await _send(errand, run, run.left(there), tally)


def _check_step(errand: Errand, family: str | None, side: int) -> None:
    buckets = errand.wish.buckets
    multiple = FAMILIES[family].size_multiple if family in FAMILIES else side
    if buckets is not None and buckets.step % multiple:
        raise InvalidInput(f"buckets of {buckets.text} are no multiples of {multiple}, as {family} takes them")


async def _send(errand: Errand, run: Run, items: list[Item], tally: Tally) -> None:
    files = asyncio.Semaphore(max(1, min(AT_ONCE, errand.settings.queue_size) // (1 + errand.wish.flip)))
    with Progress(len(items), "picture" if errand.op == "encode" else "file") as progress:

        async def one(item: Item) -> None:
            try:
                await run.convert(item, progress.say)
            except (ServiceError, OSError, httpx.HTTPError) as error:
                if isinstance(error, Stop) or systemic(error):
                    raise Stop(f"{item.name}: {reason(error)}") from error
                tally.failed.append((item.name, reason(error)))
                progress.say(f"{item.name}: {reason(error)}")
            finally:
                files.release()
            progress.step()

        try:
            async with asyncio.TaskGroup() as group, aclosing(run.in_order(items)) as ordered:
                async for item in ordered:
                    await files.acquire()
                    group.create_task(one(item))
        except ExceptionGroup as errors:
            stops, bugs = errors.split(Stop)
            if bugs is not None or stops is None:
                raise
            raise stops.exceptions[0] from None
