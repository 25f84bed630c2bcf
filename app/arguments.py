"""What the command line takes: commands, options and their help. What they do is `cli.py`'s to say."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from app import __version__
from app.settings import Settings

Commands = Any  # what add_subparsers gives; argparse keeps its class to itself


def parser() -> argparse.ArgumentParser:
    """The whole of it. What is parsed has `command`, and of `encode` and `decode` their name as `op`."""
    top = argparse.ArgumentParser(prog="latentd", description="Turns pictures into latents and latents into pictures.")
    top.add_argument("--version", action="version", version=f"latentd {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _serve(commands)
    _encode(commands)
    _decode(commands)
    _models(commands)
    _inspect(commands)
    _convert(commands)
    _merge(commands)
    _compare(commands)
    _fetch(commands)
    return top


def _serve(commands: Commands) -> None:
    serve = commands.add_parser("serve", help="run the service")
    serve.add_argument("--host", help="address to listen at; default 127.0.0.1")
    serve.add_argument("--port", type=_port, help="0: any free one; default 8000")
    serve.add_argument("--uds", type=Path, metavar="PATH", help="listen at a Unix socket instead")
    serve.add_argument("--ssl-certfile", type=Path, metavar="PEM", help="serve https: the certificate and its chain")
    serve.add_argument("--ssl-keyfile", type=Path, metavar="PEM", help="its key; default: in the same file")
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = "unset" if field.default is None else f"default {_text(field.default)}"
        serve.add_argument(flag, dest=name, metavar="VALUE", help=f"LATENTD_{name.upper()}, {default}")


def _encode(commands: Commands) -> None:
    encode = commands.add_parser("encode", help="pictures to latents: files, or whole folders")
    encode.add_argument(
        "inputs", nargs="+", metavar="IMAGE", help="PNG, JPEG, WebP, AVIF, MP4, WebM or MKV, a folder of them, or -"
    )
    _work(encode, "a folder; of one picture also a .npy or .safetensors file, or - for stdout")
    posterior = encode.add_mutually_exclusive_group()
    posterior.add_argument("--posterior", choices=("mode", "sample"), help="of the latents' distribution; default mode")
    for name in ("mode", "sample"):
        posterior.add_argument(
            f"--{name}", action="store_const", const=name, dest="posterior", help=f"--posterior {name}"
        )
    encode.add_argument("--seed", type=int, help="of --posterior sample; default: another one for each picture")
    encode.add_argument(
        "--fit", choices=("pad", "crop", "resize", "error"), help="sizes that the network cannot take; default pad"
    )
    encode.add_argument(
        "--buckets",
        metavar="WxH:STEP",
        help="resize and cut to sizes of this area, sides in such steps; :LEAST-MOST after it bounds them (256-1024)",
    )
    encode.add_argument("--flip", action="store_true", help="encode each picture's mirrored twin as well")
    encode.add_argument(
        "--format",
        choices=("npy", "safetensors", "kohya"),
        help="of the files; kohya: as sd-scripts reads them",
    )
    encode.add_argument(
        "--frames",
        choices=("trim", "pad", "error"),
        help="takes a .webp, .png or .npy for a clip; of a number that is not 4k + 1: drop, repeat the last, refuse",
    )


def _decode(commands: Commands) -> None:
    decode = commands.add_parser("decode", help="latents to pictures: files, or whole folders")
    decode.add_argument(
        "inputs",
        nargs="+",
        metavar="LATENT",
        help=".npy .npz .safetensors .latent .pt, a folder of them, or - for stdin",
    )
    _work(
        decode,
        "a folder; of one latent also a .png, .jpg, .webp, .avif, of several a .zip, of a clip .mp4, .webm, .mkv; or -",
    )
    decode.add_argument(
        "--size", metavar="WxH", help="cut pictures to this; default: to what `encode` noted beside them"
    )
    decode.add_argument("--fps", type=int, help="of a clip that moves; default 16")
    decode.add_argument(
        "--lossless", action="store_const", const=True, help="exactly the frames, of a clip as .mp4, .webm or .webp"
    )


def _work(command: argparse.ArgumentParser, output: str) -> None:
    """What encode and decode share."""
    command.add_argument("-o", "--output", required=True, metavar="OUT", help=output)
    existing = command.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="skip what exists, if this model and these options made it"
    )
    existing.add_argument("--force", action="store_true", help="replace what exists")
    command.add_argument(
        "--workers", type=_threads, help="threads that read, decode, resize and write; default: by the processors"
    )
    command.add_argument("--summary", type=Path, metavar="FILE", help="write what was done, and what failed, as JSON")
    _service(command)
    command.add_argument("--models", metavar="DIR", help="the models folder; default LATENTD_MODELS")
    command.add_argument("--device", help="auto, cpu, cuda:0,cuda:1; default LATENTD_DEVICE")
    command.add_argument("--model", help="name or sha256 prefix; default: the default model, else the only one")
    command.add_argument("--latents", choices=("scaled", "raw"), help="convention of the latents; default scaled")
    command.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), help="default auto")
    command.add_argument("--tiling", choices=("auto", "never", "always"), help="over bands of rows; default auto")


def _models(commands: Commands) -> None:
    models = commands.add_parser("models", help="list the models of a folder, or of a service")
    models.add_argument("--models", metavar="DIR", help="the models folder; default LATENTD_MODELS")
    _service(models)
    _json(models)


def _inspect(commands: Commands) -> None:
    inspect = commands.add_parser("inspect", help="say what a file is")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, one half of a pair, a diffusers folder")
    _family(inspect)
    _json(inspect)


def _convert(commands: Commands) -> None:
    convert = commands.add_parser("convert", help="write a VAE as .safetensors; takes it out of a full checkpoint")
    convert.add_argument(
        "source", type=Path, metavar="SRC", help="a checkpoint, one half of a pair, a diffusers folder"
    )
    convert.add_argument("target", type=Path, metavar="DST", help="a .safetensors file, or a diffusers folder")
    _family(convert)
    _output(convert)


def _merge(commands: Commands) -> None:
    merge = commands.add_parser("merge", help="a weighted mean of two VAEs: (1 - ratio) * A + ratio * B")
    merge.add_argument("a", type=Path, metavar="A", help="a VAE, as for convert")
    merge.add_argument("b", type=Path, metavar="B", help="A once more, to change brightness and contrast alone")
    merge.add_argument(
        "-o", "--output", type=Path, required=True, dest="target", metavar="C", help="the file to write, as for convert"
    )
    merge.add_argument("--ratio", type=_ratio, default=0.5, help="weight of B, -1 to 2; default %(default)s")
    merge.add_argument("--encoder-ratio", type=_ratio, metavar="RATIO", help="default: --ratio")
    merge.add_argument("--decoder-ratio", type=_ratio, metavar="RATIO", help="default: --ratio")
    merge.add_argument("--contrast", type=_number, default=1.0, help="factor of the decoded picture in [-1, 1]")
    merge.add_argument("--brightness", type=_number, default=0.0, help="added to the decoded picture in [-1, 1]")
    _family(merge)
    _output(merge)


def _compare(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="one round trip of a picture through each VAE: a sheet and figures")
    compare.add_argument("image", type=Path, metavar="IMAGE", help="a PNG, JPEG, WebP or AVIF")
    compare.add_argument("--models", type=_names, default=[], metavar="A,B,...", help="default: all usable ones")
    compare.add_argument(
        "-o", "--output", type=Path, default=Path("compare.png"), metavar="SHEET", help="default %(default)s"
    )
    compare.add_argument("--folder", metavar="DIR", help="the models folder; default LATENTD_MODELS")
    compare.add_argument("--device", help="auto, cpu, cuda:0,cuda:1; default LATENTD_DEVICE")
    _service(compare)
    _json(compare)


def _fetch(commands: Commands) -> None:
    fetch = commands.add_parser("fetch", help="download a known VAE into the models folder")
    which = fetch.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", metavar="NAME", help="one of --list")
    which.add_argument("--list", action="store_true", help="say what there is")
    fetch.add_argument(
        "--models", metavar="DIR", help="the models folder; default LATENTD_MODELS, of several the first"
    )
    fetch.add_argument(
        "--base-url", metavar="URL", help="a mirror of the hub; default HF_ENDPOINT, else huggingface.co"
    )
    fetch.add_argument("--force", action="store_true", help="replace another file of the same name")


def _service(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url", help="use the service there (http://, https://, unix:PATH), not this process; default LATENTD_URL"
    )
    command.add_argument("--key", help="API key of that service; default LATENTD_KEY")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _family(command: argparse.ArgumentParser) -> None:
    # Its names are checked by the command: their table would bring torch.
    command.add_argument("--family", help="sd1, sdxl, flux, ...: your word, over all that the files tell")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="default: every tensor keeps its own")
    command.add_argument("--layout", choices=("ldm", "diffusers"), help="of the keys; default: as in the source")
    command.add_argument("--force", action="store_true", help="replace what exists")


def _text(default: object) -> str:
    return os.pathsep.join(map(str, default)) if isinstance(default, tuple) else str(default)


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


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"threads are 1 to 256, not {text}")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:  # an empty variable must not become all models
        raise argparse.ArgumentTypeError(f"expected names, A,B,..., not {text!r}")
    return names


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text}")
    return int(text)
