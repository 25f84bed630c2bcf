"""The command line: latentd serve | encode | decode | models | inspect | convert | merge | compare | fetch.

Exit status 0 done, 1 failed, 2 usage. Errors are one line on stderr; a traceback means a bug of ours.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app import __version__
from app.allocator import keep_pages
from app.errors import ServiceError, UnsupportedCheckpoint
from app.settings import InvalidSetting, Settings
from app.stdout import flushed_stdout, open_stdout

QUERY = ("model", "latents", "precision", "tiling", "seed", "posterior", "fit", "size")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    open_stdout()
    try:
        with flushed_stdout():
            args = _parser().parse_args(argv)
            keep_pages()  # before torch allocates anything
            status: int = args.run(args)
        return status
    except ValidationError as error:
        return _failed("; ".join(f"setting {e['loc'][0]}: {e['msg']}" for e in error.errors()), 2)
    except InvalidSetting as error:
        return _failed(f"setting {error}", 2)
    except BrokenPipeError:  # the reader has what it wanted, as in `| head -1`
        return 1
    except (ServiceError, OSError) as error:
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 1)


def _failed(message: str, status: int) -> int:
    sys.stderr.write(f"latentd: {' '.join(message.split())}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latentd", description="Turns pictures into latents and latents into pictures."
    )
    parser.add_argument("--version", action="version", version=f"latentd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the service")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=_port, default=8000, help="0: any free one")
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        serve.add_argument(
            flag, dest=name, default=None, metavar="VALUE", help=f"LATENTD_{name.upper()}, {_default(field)}"
        )
    serve.set_defaults(run=_serve)

    for op, noun in (("encode", "IMAGE"), ("decode", "LATENT")):
        command = commands.add_parser(op, help=f"{op} files or whole folders")
        command.add_argument("inputs", nargs="+", type=Path, metavar=noun)
        command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
        command.add_argument("--url", help="use the service at this address instead of this process")
        command.add_argument("--key", help="API key of that service")
        command.add_argument("--resume", action="store_true", help="skip what exists")
        command.add_argument("--models", type=Path, default=None)
        command.add_argument("--device", default=None)
        command.add_argument("--model")
        command.add_argument("--latents", choices=("scaled", "raw"))
        command.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"))
        command.add_argument("--tiling", choices=("auto", "never", "always"))
        command.add_argument("--seed", type=int) if op == "encode" else command.add_argument("--size", metavar="WxH")
        if op == "encode":
            command.add_argument("--posterior", choices=("mode", "sample"))
            command.add_argument("--fit", choices=("pad", "crop", "resize", "error"))
        command.set_defaults(run=_files, op=op)

    models = commands.add_parser("models", help="list the models of a folder")
    models.add_argument("--models", type=Path, default=None)
    models.add_argument("--json", action="store_true")
    models.set_defaults(run=_models)

    inspect = commands.add_parser("inspect", help="say what a file is")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a VAE as .safetensors; takes it out of a full checkpoint")
    convert.add_argument(
        "source", type=Path, metavar="SRC", help="a checkpoint, one half of a pair, a diffusers folder"
    )
    convert.add_argument("target", type=Path, metavar="DST", help="a .safetensors file, or a diffusers folder")
    _output(convert)
    convert.set_defaults(run=_convert)

    merge = commands.add_parser("merge", help="a weighted mean of two VAEs: (1 - ratio) * A + ratio * B")
    merge.add_argument("a", type=Path, metavar="A")
    merge.add_argument("b", type=Path, metavar="B", help="A once more, to change brightness and contrast alone")
    merge.add_argument("-o", "--output", type=Path, required=True, dest="target", metavar="C")
    merge.add_argument("--ratio", type=_ratio, default=0.5, help="weight of B, -1 to 2; default %(default)s")
    merge.add_argument("--encoder-ratio", type=_ratio, metavar="RATIO", help="default: --ratio")
    merge.add_argument("--decoder-ratio", type=_ratio, metavar="RATIO", help="default: --ratio")
    merge.add_argument("--contrast", type=_number, default=1.0, help="factor of the decoded picture in [-1, 1]")
    merge.add_argument("--brightness", type=_number, default=0.0, help="added to the decoded picture in [-1, 1]")
    _output(merge)
    merge.set_defaults(run=_merge)

    compare = commands.add_parser("compare", help="one round trip of a picture through each VAE: a sheet and figures")
    compare.add_argument("image", type=Path, metavar="IMAGE")
    compare.add_argument("--models", type=_names, default=[], metavar="A,B,...", help="default: all usable ones")
    compare.add_argument("-o", "--output", type=Path, default=Path("compare.png"), metavar="SHEET")
    compare.add_argument("--folder", type=Path, metavar="DIR", help="the models folder")
    compare.add_argument("--device")
    compare.add_argument("--url", help="use the service at this address instead of this process")
    compare.add_argument("--key", help="API key of that service")
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(run=_compare)

    fetch = commands.add_parser("fetch", help="download a known VAE into the models folder")
    which = fetch.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME")
    which.add_argument("--list", action="store_true", help="say what there is")
    fetch.add_argument("--models", type=Path, default=None)
    fetch.add_argument(
        "--base-url", metavar="URL", help="a mirror of the hub; default HF_ENDPOINT, else huggingface.co"
    )
    fetch.add_argument("--force", action="store_true", help="replace another file of the same name")
    fetch.set_defaults(run=_fetch)
    return parser


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="default: every tensor keeps its own")
    command.add_argument("--layout", choices=("ldm", "diffusers"), help="of the keys; default: as in the source")
    command.add_argument("--force", action="store_true", help="replace what exists")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, not {text}")
    return value


def _ratio(text: str) -> float:
    value = _number(text)
    if not -1 <= value <= 2:
        raise argparse.ArgumentTypeError(f"a ratio is -1 to 2 (0: A, 1: B), not {text}")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:  # an empty variable must not become all models
        raise argparse.ArgumentTypeError(f"expected names, A,B,..., not {text!r}")
    return names


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text}")
    return int(text)


def _default(field: Any) -> str:
    return "unset" if field.default is None else f"default {field.default}"


def _settings(**given: object) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # text still: pydantic reads it


def _serve(args: argparse.Namespace) -> int:
    from app.main import serve  # torch and the web stack load only here

    settings = _settings(**{name: getattr(args, name) for name in Settings.model_fields})
    return serve(settings, args.host, args.port)


def _files(args: argparse.Namespace) -> int:
    from app.tools.folders import send_files

    query = {name: value for name in QUERY if (value := getattr(args, name, None)) is not None}
    settings = _settings(models=args.models, device=args.device)
    return send_files(
        args.op, args.inputs, args.output, query, settings, url=args.url, key=args.key, resume=args.resume
    )


def _models(args: argparse.Namespace) -> int:
    from app.store.store import ModelStore
    from app.tools.facts import facts_of, table

    settings = _settings(models=args.models)
    if not settings.models.is_dir():
        raise NotADirectoryError(f"{settings.models} is no folder")
    store = ModelStore(settings.models, settings.default_family)
    store.scan()
    entries = store.entries()
    if args.json:
        return _print(json.dumps({"models": [facts_of(entry) for entry in entries]}, indent=2))
    return _print(*table(entries))


def _inspect(args: argparse.Namespace) -> int:
    from app.tools.facts import facts_of, lines

    facts = facts_of(_open(args.file))
    return _print(json.dumps(facts, indent=2)) if args.json else _print(*lines(facts))


def _convert(args: argparse.Namespace) -> int:
    from app.tools.convert import convert

    source = _open(args.source)
    return _written(convert(source, _wanted(args)))


def _merge(args: argparse.Namespace) -> int:
    from app.tools.merge import Blend, merge

    blend = Blend(
        encoder_ratio=args.ratio if args.encoder_ratio is None else args.encoder_ratio,
        decoder_ratio=args.ratio if args.decoder_ratio is None else args.decoder_ratio,
        contrast=args.contrast,
        brightness=args.brightness,
    )
    return _written(merge(_open(args.a), _open(args.b), blend, _wanted(args)))


def _compare(args: argparse.Namespace) -> int:
    from app.tools.compare import compare_models

    settings = _settings(models=args.folder, device=args.device)
    return compare_models(args.image, args.models, args.output, settings, url=args.url, key=args.key, as_json=args.json)


def _fetch(args: argparse.Namespace) -> int:
    from app.text import shown
    from app.tools.fetch import HUB, fetch, listing

    if args.list:
        return _print(*listing())
    base = args.base_url or os.environ.get("HF_ENDPOINT") or HUB
    token = os.environ.get("HF_TOKEN", "").strip() or None
    files = fetch(args.name, _settings(models=args.models).models, base, token, force=args.force)
    return _print(*(shown(file.path) + ("" if file.new else " is there already") for file in files))


def _open(path: Path) -> Any:
    from app.store.store import open_checkpoint

    try:
        return open_checkpoint(path, _settings().default_family)
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
    return _print(f"{shown(path)}: {what}")


def _print(*lines: str) -> int:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    return 0
