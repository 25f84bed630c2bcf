"""The command line: latentd serve | encode | decode | models | inspect | convert | merge | compare | fetch.

Exit status 0 done, 1 failed, 2 usage, 130 interrupted. Errors are one line on stderr; a traceback means a bug of ours.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.allocator import keep_pages
from app.arguments import parser
from app.errors import InvalidInput, ServiceError, UnsupportedCheckpoint
from app.settings import InvalidSetting, Settings, check_folders
from app.stdout import flushed_stdout, open_stdout

QUERY = (
    *("model", "latents", "precision", "tiling", "seed", "posterior", "fit", "size"),
    *("frames", "fps", "lossless"),  # of clips
)


class Usage(ValueError):
    """A command line that only the command itself can tell to be wrong."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    open_stdout()
    try:
        with flushed_stdout():
            args = parser().parse_args(argv)
            keep_pages()  # before torch allocates anything
            logging.basicConfig(level=logging.WARNING, format="latentd: %(message)s")  # `serve` has its own
            status: int = COMMANDS[args.command](args)
        return status
    except ValidationError as error:
        return _failed("; ".join(f"setting {e['loc'][0]}: {e['msg']}" for e in error.errors()), 2)
    except InvalidSetting as error:
        return _failed(f"setting {error}", 2)
    except Usage as error:
        return _failed(str(error), 2)
    except BrokenPipeError:  # the reader has what it wanted, as in `| head -1`
        return 1
    except (ServiceError, OSError) as error:
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)


def _failed(message: str, status: int) -> int:
    sys.stderr.write(f"latentd: {' '.join(message.split())}\n")
    return status


def _settings(**given: object) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # text still: pydantic reads it


def _address(args: argparse.Namespace, folder: str | None) -> tuple[str | None, str | None]:
    """(URL, key) of the service to use; a models folder that was asked for says that it is this process."""
    if args.url and folder:
        raise Usage("a models folder is for this process, --url for another: give one of them")
    here = folder or getattr(args, "device", None)
    url = args.url or (None if here else os.environ.get("LATENTD_URL") or None)
    return url, (args.key or os.environ.get("LATENTD_KEY") or None) if url else None


def _serve(args: argparse.Namespace) -> int:
    from app.main import serve  # torch and the web stack load only here
    from app.server import Listening

    where = {"host": args.host, "port": args.port, "certificate": args.ssl_certfile, "key": args.ssl_keyfile}
    given = {name: value for name, value in where.items() if value is not None}
    if args.uds and given:
        raise Usage("--uds is instead of an address: without --host, --port and TLS")
    if args.ssl_keyfile and not args.ssl_certfile:
        raise Usage("--ssl-keyfile is of a certificate: with --ssl-certfile")
    settings = _settings(**{name: getattr(args, name) for name in Settings.model_fields})
    return serve(settings, Listening(uds=args.uds, **given))


def _files(args: argparse.Namespace) -> int:
    from app.tools.errand import Errand, Existing
    from app.tools.folders import send_files

    wish = _wish(args) if args.command == "encode" else {}
    url, key = _address(args, args.models)
    query = {name: value for name in QUERY if (value := getattr(args, name, None)) is not None}
    existing: Existing = "skip" if args.resume else "replace" if args.force else "refuse"
    settings = _settings(models=args.models, device=args.device)
    threads, summary = args.workers, args.summary
    errand = Errand(args.command, query, existing, url, key, settings, workers=threads, summary=summary, **wish)
    return send_files(errand, args.inputs, args.output)


def _wish(args: argparse.Namespace) -> dict[str, Any]:
    """What is to become of pictures besides being encoded."""
    from app.tools.buckets import parse_buckets
    from app.tools.pictures import Wish

    if args.buckets and args.fit:
        raise Usage("--buckets settles the sizes: without --fit")
    if args.format == "kohya" and not args.buckets:
        raise Usage("--format kohya needs the buckets of the training, as in --buckets 1024x1024:64")
    if args.format == "kohya" and args.latents:
        raise Usage("--format kohya settles the convention: without --latents")
    try:
        buckets = parse_buckets(args.buckets) if args.buckets else None
    except InvalidInput as error:
        raise Usage(str(error)) from None
    return {"wish": Wish(buckets, args.flip, args.format)}


def _models(args: argparse.Namespace) -> int:
    from app.tools.facts import facts_of, table

    url, key = _address(args, args.models)
    settings = _settings(models=args.models)
    if url is not None:
        from app.tools.service import list_models

        rows = list_models(url, key, settings)
        return _print(*([json.dumps({"models": rows}, indent=2)] if args.json else table(rows)))
    from app.store.row import row_of
    from app.store.store import ModelStore

    check_folders(settings)
    store = ModelStore(settings.models, settings.default_family)
    store.scan()
    entries = store.entries()
    if args.json:
        return _print(json.dumps({"models": [facts_of(entry) for entry in entries]}, indent=2))
    return _print(*table(map(row_of, entries)))


def _inspect(args: argparse.Namespace) -> int:
    from app.tools.facts import facts_of, lines

    checkpoint = _open(args.file, args.family)
    facts = facts_of(checkpoint)
    _print(json.dumps(facts, indent=2)) if args.json else _print(*lines(facts))
    return _warn(checkpoint)


def _convert(args: argparse.Namespace) -> int:
    from app.tools.convert import convert

    source = _open(args.source, args.family)
    return _written(convert(source, _wanted(args)))


def _merge(args: argparse.Namespace) -> int:
    from app.tools.merge import Blend, merge

    blend = Blend(
        encoder_ratio=args.ratio if args.encoder_ratio is None else args.encoder_ratio,
        decoder_ratio=args.ratio if args.decoder_ratio is None else args.decoder_ratio,
        contrast=args.contrast,
        brightness=args.brightness,
    )
    return _written(merge(_open(args.a, args.family), _open(args.b, args.family), blend, _wanted(args)))


def _compare(args: argparse.Namespace) -> int:
    from app.tools.compare import compare_models

    url, key = _address(args, args.folder)
    settings = _settings(models=args.folder, device=args.device)
    return compare_models(args.image, args.models, args.output, settings, url=url, key=key, as_json=args.json)


def _fetch(args: argparse.Namespace) -> int:
    from app.text import shown
    from app.tools.fetch import HUB, fetch, listing

    if args.list:
        return _print(*listing())
    base = args.base_url or os.environ.get("HF_ENDPOINT") or HUB
    token = os.environ.get("HF_TOKEN", "").strip() or None
    files = fetch(args.name, _settings(models=args.models).models[0], base, token, force=args.force)
    return _print(*(shown(file.path) + ("" if file.new else " is there already") for file in files))


COMMANDS = {
    "serve": _serve,
    "encode": _files,
    "decode": _files,
    "models": _models,
    "inspect": _inspect,
    "convert": _convert,
    "merge": _merge,
    "compare": _compare,
    "fetch": _fetch,
}


def _open(path: Path, family: str | None = None) -> Any:
    from app.store.store import open_checkpoint
    from app.vae.families import FAMILIES

    if family is not None and family not in FAMILIES:
        raise Usage(f"--family is one of {', '.join(FAMILIES)}; not {family}")
    try:
        return open_checkpoint(path, _settings().default_family, family)
    except UnsupportedCheckpoint as error:
        text = str(error)
        raise UnsupportedCheckpoint(text if str(path) in text else f"{path}: {text}") from error


def _wanted(args: argparse.Namespace) -> Any:
    from app.tools.convert import CAST_TO, Output

    return Output(args.target, args.layout, CAST_TO[args.dtype] if args.dtype else None, args.force)


def _written(path: Path) -> int:
    from app.text import shown

    facts = _open(path)
    what = f"{facts.family.name} ({facts.family_source}), {facts.weight_dtype}, sha256 {facts.sha256}"
    _print(f"{shown(path)}: {what}")
    return _warn(facts)


def _warn(checkpoint: Any) -> int:
    """Says where a family is a guess; the work is done all the same."""
    if checkpoint.doubt:
        sys.stderr.write(f"latentd: warning: {checkpoint.doubt}; or --family says it\n")
    return 0


def _print(*lines: str) -> int:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    return 0
