"""The command line: latentd serve | encode | decode | models | inspect.

Exit status 0 done, 1 failed, 2 usage. Errors are one line on stderr; a traceback means a bug of ours.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app import __version__
from app.allocator import keep_pages
from app.errors import ServiceError
from app.settings import InvalidSetting, Settings

QUERY = ("model", "latents", "precision", "tiling", "seed", "posterior", "fit", "size")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parser().parse_args(argv)
    keep_pages()  # before torch allocates anything
    try:
        status: int = args.run(args)
        return status
    except ValidationError as error:
        return _failed("; ".join(f"setting {e['loc'][0]}: {e['msg']}" for e in error.errors()), 2)
    except InvalidSetting as error:
        return _failed(f"setting {error}", 2)
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
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text}")
    return int(text)


def _default(field: Any) -> str:
    return "unset" if field.default is None else f"default {field.default}"


def _settings(**given: object) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _serve(args: argparse.Namespace) -> int:
    from app.main import serve  # torch and the web stack load only here

    settings = _settings(**{name: getattr(args, name) for name in Settings.model_fields})
    return serve(settings, args.host, args.port)


def _files(args: argparse.Namespace) -> int:
    from app.files import send_files

    query = {name: value for name in QUERY if (value := getattr(args, name, None)) is not None}
    settings = _settings(models=args.models, device=args.device)
    return send_files(
        args.op, args.inputs, args.output, query, settings, url=args.url, key=args.key, resume=args.resume
    )


def _models(args: argparse.Namespace) -> int:
    from app.store.checkpoint import Checkpoint
    from app.store.store import ModelStore

    settings = _settings(models=args.models)
    if not settings.models.is_dir():
        raise NotADirectoryError(f"{settings.models} is no folder")
    store = ModelStore(settings.models, settings.default_family)
    store.scan()
    entries = store.entries()
    if args.json:
        _print(json.dumps({"models": [describe(entry) for entry in entries]}, indent=2))
        return 0
    rows = [("NAME", "FAMILY", "FROM", "FORMAT", "SHA256", "FP16", "KNOWN AS")]
    for entry in entries:
        if isinstance(entry, Checkpoint):
            family, source = entry.family.name, entry.family_source
            rows.append((entry.name, family, source, entry.format, entry.sha256[:10], entry.fp16, entry.known_as or ""))
        else:
            rows.append((entry.name, "-", "-", entry.format or "-", "-", "-", f"ERROR: {entry.error}"))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        _print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:6], widths, strict=True)), row[6]]).rstrip())
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from app.store.store import open_checkpoint

    facts = describe(open_checkpoint(args.file, _settings().default_family))
    if args.json:
        _print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            _print(f"{key.ljust(width)}  {value}")
    return 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def describe(entry: Any) -> dict[str, Any]:
    """What a file is, as plain values."""
    from app.store.checkpoint import Checkpoint
    from app.store.folder import shown

    if not isinstance(entry, Checkpoint):
        return {"name": entry.name, "path": shown(entry.path), "format": entry.format, "error": entry.error}
    family = entry.family
    return {
        "name": entry.name,
        "path": shown(entry.path),
        "family": family.name,
        "family_source": entry.family_source,
        "format": entry.format,
        "layout": _layout(entry),
        "dtype": entry.weight_dtype,
        "parameters": entry.parameters,
        "sha256": entry.sha256,
        "known_as": entry.known_as,
        "fp16": entry.fp16,
        "baked": entry.baked,
        "latent_channels": family.latent_channels,
        "spatial_factor": family.spatial_factor,
        "scaling_factor": family.latent_format.scaling_factor,
        "shift_factor": family.latent_format.shift_factor,
    }


def _layout(checkpoint: Any) -> str:
    """`ldm` where the file's keys are the canonical ones, up to a prefix; else `diffusers`."""
    from app.store.formats import read_header
    from app.store.renames import canonical_keys, prefix_of

    for path in checkpoint.files:
        keys = read_header(path).tensors
        prefix = prefix_of(keys)
        for key, name in canonical_keys(keys, path.stem).items():
            if not (key.endswith(name) or name.endswith(key.removeprefix(prefix))):
                return "diffusers"
    return "ldm"
