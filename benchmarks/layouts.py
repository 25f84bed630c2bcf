"""`python -m benchmarks.layouts`: files of today's VAEs in every layout, dropped into a running service's folder.

diffusers' classes at their published widths with random weights make the files. Of each file: how far its network is
from diffusers' with the weights as stored, both in float32, in one go and in strips, two pictures at once of sides that
no tile divides, as parts of diffusers' range; how far the PNG that curl gets is from it, in levels; and whether
converted to the other layout and back it is the same file, bit by bit. Prints the table of docs/models.md.
"""

import argparse
import gc
import io
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from PIL import Image
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.execution.banded import STRIPS, gather
from app.execution.primitive import Whole
from app.store.checkpoint import load_autoencoder
from app.store.store import open_checkpoint
from app.tools.convert import Output, convert
from app.vae.architectures import ARCHITECTURES
from app.vae.autoencoder import Autoencoder
from app.weights.files import open_weights
from app.weights.parts import whole_of
from benchmarks.pairs import table
from benchmarks.published import PEERS, distance, peer
from tests.demo import service, wait_until_ready
from tests.store.weights import write

State = dict[str, Tensor]
Keep = Callable[[Any, str, Path], Path]
"""Writes diffusers' network of an architecture into a folder; returns what latentd shall read."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POSITIONS = (5, 7)  # of a latent
PREFIXES = ("vae.", "first_stage_model.", "model.")
CPU = torch.device("cpu")
HEADER = ("", "layout", "stored as", "decode", "encode", "PNG, levels", "there and back")
SECONDS = 120  # until a file in the folder is listed


def published(theirs: Any, architecture: str) -> State:
    """The publisher's names and shapes."""
    row, state = ARCHITECTURES[architecture], theirs.state_dict()
    named = {name: state[key] for key, name in row.keys(state).items()}
    shaped = {name: value.reshape(row.shape(name, tuple(value.shape))) for name, value in named.items()}
    return {key: torch.cat([shaped[part] for part in parts]) for key, parts in whole_of(shaped, row).items()}


def flat(value: Tensor) -> Tensor:
    """A kernel of which pictures use the last tap."""
    return value[:, :, -1].contiguous() if value.dim() == 5 else value


def safetensors(theirs: Any, architecture: str, folder: Path, prefix: str = "") -> Path:
    path = folder / f"{prefix or 'x.'}safetensors"
    return write(path, {prefix + key: value for key, value in published(theirs, architecture).items()})


def pickled(theirs: Any, architecture: str, folder: Path) -> Path:
    return write(folder / "x.pth", published(theirs, architecture))


def flattened(theirs: Any, architecture: str, folder: Path) -> Path:
    state = published(theirs, architecture).items()
    return write(folder / "x.safetensors", {key: flat(value) for key, value in state if "time_conv" not in key})


def deepened(theirs: Any, architecture: str, folder: Path) -> Path:
    """Kernels of two dimensions with a third, of one tap."""
    state = published(theirs, architecture).items()
    deep = {key: value[:, :, None].contiguous() if value.dim() == 4 else value for key, value in state}
    return write(folder / "x.safetensors", deep)


def kept_by_diffusers(theirs: Any, architecture: str, folder: Path) -> Path:
    theirs.save_pretrained(folder / "x")
    return folder / "x"


USUAL: dict[str, Keep] = {
    "the publisher's, `.safetensors`": safetensors,
    "folder of diffusers": kept_by_diffusers,
}
WRAPPED: dict[str, Keep] = {f"`{prefix}`": partial(safetensors, prefix=prefix) for prefix in PREFIXES}
PUBLISHED: dict[str, Keep] = {"the publisher's, `.pth`": pickled}
TWO: dict[str, Keep] = {"two dimensions": flattened}


@dataclass(frozen=True)
class Case:
    """A network, and the layouts that its files have."""

    family: str
    architecture: str
    make: Callable[[], Any]
    layouts: Mapping[str, Keep]


CASES = {
    "wan21": Case("wan21", "wan21", PEERS["wan21"], USUAL | PUBLISHED | WRAPPED | TWO),
    "layered": Case("wan21", "wan21", lambda: AutoencoderKLQwenImage(input_channels=4), USUAL | TWO),
    "light": Case("wan21", "wan21", lambda: AutoencoderKLWan(base_dim=24), USUAL | TWO),
    "wan22": Case("wan22", "wan22", PEERS["wan22"], USUAL | PUBLISHED | TWO),
    "qwenimage21": Case("qwenimage21", "qwenimage21", PEERS["qwenimage21"], USUAL | {"a tap more": deepened}),
    "sana": Case("sana", "dc", PEERS["dc"], USUAL | {"`vae.`": WRAPPED["`vae.`"]}),
    "hunyuanimage": Case("hunyuanimage", "hunyuan", PEERS["hunyuan"], USUAL | {"`vae.`": WRAPPED["`vae.`"]}),
}


def given(ours: Autoencoder) -> dict[str, Tensor]:
    """Two latents, and two pictures."""
    config, (h, w) = ours.config, POSITIONS
    generator = torch.Generator().manual_seed(0)
    side = config.spatial_factor
    return {
        "decode": torch.randn(2, config.latent_channels, h, w, generator=generator),
        "encode": torch.rand(2, config.pixel_channels, h * side, w * side, generator=generator) * 2 - 1,
    }


def apart(ours: Autoencoder, op: str, x: Tensor, expected: Tensor) -> float:
    """The larger difference of whole and of strips."""
    network = ours.decode if op == "decode" else ours.encode
    x = x.contiguous(memory_format=torch.channels_last)
    return max(distance(found, expected)[0] for found in (network(Whole(), x), gather(STRIPS, network, x)))


def through_curl(client: httpx.Client, name: str, latent: Tensor, expected: Tensor) -> int:
    """How many levels the picture is off, at most."""
    body = io.BytesIO()
    np.save(body, latent.numpy())
    url = f"{client.base_url}/decode?model={name}&latents=raw&precision=fp32"
    command = ["curl", "-fsS", "--noproxy", "*", "--data-binary", "@-", "-H", "Accept: image/png", url]
    png = subprocess.run(command, input=body.getvalue(), stdout=subprocess.PIPE, check=True).stdout
    with Image.open(io.BytesIO(png)) as picture:
        found = np.asarray(picture, dtype=np.int16)
    levels = ((expected + 1) * 127.5).clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.int16)
    return int(np.abs(found - levels).max())


def listed(client: httpx.Client, name: str) -> None:
    """Waits until the service has read the file."""
    for _ in range(SECONDS * 2):
        rows = {row["name"]: row for row in client.get("/models").json()["models"]}
        if name in rows:
            if rows[name]["error"]:
                raise SystemExit(f"{name}: {rows[name]['error']}")
            return
        time.sleep(0.5)
    raise SystemExit(f"{name} was not listed")


def comes_back(path: Path, family: str, scratch: Path) -> str:
    """Whether every tensor survives the other layout; or why there is none."""
    source = open_checkpoint(path, family)
    try:
        if path.is_dir():
            there = convert(source, Output(scratch / "there.safetensors", "ldm"))
        else:
            there = convert(source, Output(scratch / "there", "diffusers")).parent
    except UnsupportedCheckpoint:
        return "no such class"
    if path.is_dir():
        back = convert(open_checkpoint(there, family), Output(scratch / "back", "diffusers"))
    else:
        back = convert(open_checkpoint(there, family), Output(scratch / "back.safetensors", "ldm"))
    before, after = tensors(path), tensors(back)
    same = before.keys() == after.keys() and all(
        torch.equal(before[key].flatten(), after[key].flatten()) for key in before
    )
    return "yes" if same else "no"


def tensors(path: Path) -> State:
    """A file's, without a prefix."""
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    prefix = f"{path.stem}." if f"{path.stem}." in PREFIXES else ""
    whole = open_weights(file)
    return {key.removeprefix(prefix): value for key, value in whole.read(whole.tensors)}


@torch.inference_mode()
def rows(name: str, dtypes: Iterable[str], client: httpx.Client, models: Path) -> Iterator[list[str]]:
    """One row for each layout and dtype of a case."""
    case = CASES[name]
    torch.manual_seed(0)
    theirs = case.make().eval().requires_grad_(False)
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        expected: dict[str, Tensor] = {}
        for layout, keep in case.layouts.items():
            with tempfile.TemporaryDirectory(dir=models.parent) as temporary:
                scratch = Path(temporary)
                path = keep(theirs.to(dtype), case.architecture, scratch)
                theirs.float()
                ours = load_autoencoder(open_checkpoint(path, case.family), torch.float32, CPU)
                inputs = given(ours)
                expected = expected or {op: peer(theirs, op, x) for op, x in inputs.items()}
                differences = [apart(ours, op, x, expected[op]) for op, x in inputs.items()]
                del ours
                back = comes_back(path, case.family, scratch) if dtype is torch.bfloat16 else ""
                served = f"{name}-{dtype_name}-{list(case.layouts).index(layout)}"
                place = path.rename(models / "VAE" / (served if path.is_dir() else served + path.suffix))
                listed(client, served)
                levels = through_curl(client, served, inputs["decode"][:1], expected["decode"][0])
                (shutil.rmtree if place.is_dir() else Path.unlink)(place)
                gc.collect()
            yield [name, layout, dtype_name, *(f"{each:.1e}" for each in differences), str(levels), back]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary, "models")
        (models / "VAE").mkdir(parents=True)
        with service(models, Path(temporary, "log"), "cpu") as (client, process):
            wait_until_ready(client, process)
            print(table(HEADER, ()))
            for row in (row for name in arguments.cases for row in rows(name, arguments.dtypes, client, models)):
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
