"""`make comfyui COMFYUI=path`: our nodes inside a real ComfyUI, beside its own on the same VAE files.

Starts both programs on free ports of the loopback, with random weights, drives graphs over ComfyUI's HTTP API, and
prints a table. Pictures may differ by one level of 255 (ComfyUI cuts the rest off when it saves), latents by what
float16 keeps of a number.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load, save_file

from clients.comfyui.nodes import DEFAULT
from tests.comfyui.servers import Comfy, Graph, Outcome, comfyui, latentd
from tests.comfyui.weights import write_models
from tests.demo import free_port, terminated

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-that-is-in-no-file"
WIDTH, HEIGHT = 198, 165  # cut to the same by 8 and by 16: ComfyUI cuts to 8 for taef2 too, and would fail on 168
ROWS, COLUMNS = 20, 25  # of the latents, where not halved
LONG = 96  # a side of latents that take this machine many seconds
PROMPT_SECONDS = 20.0
LEVELS = 1
FLOAT16 = 2.0**-10  # of the largest number
LOADER = {
    "sd1": "sd1.safetensors",
    "flux": "flux.safetensors",
    "flux2": "flux2.safetensors",
    "wan21": "wan21.safetensors",
    "taesd": "taesd",
    "taef2": "taef2",
}
SHAPES = {
    "sd1": (2, 4, ROWS, COLUMNS),
    "flux": (1, 16, ROWS, COLUMNS),
    "flux2": (1, 128, ROWS // 2, COLUMNS // 2),
    "wan21": (1, 16, 1, ROWS, COLUMNS),
    "taesd": (1, 4, ROWS, COLUMNS),
    "taef2": (1, 128, ROWS // 2, COLUMNS // 2),
}


class Failed(Exception):
    """A node did not do what it is there for."""


def node(kind: str, **inputs: object) -> dict[str, object]:
    return {"class_type": kind, "inputs": inputs}


def graph(family: str, kind: str, remote: bool, **inputs: object) -> Graph:
    """One VAE node, ComfyUI's or ours, from a file to a file."""
    nodes: Graph = {
        "picture": node("LoadImage", image="picture.png"),
        "latents": node("LoadLatent", latent=f"{family}.latent"),
    }
    service = {"model": DEFAULT if family == "sd1" else family, "url": ""}
    encodes = "Encode" in kind
    inputs = {**inputs, **({"pixels": ["picture", 0]} if encodes else {"samples": ["latents", 0]})}
    if kind == "VAEEncodeForInpaint":
        inputs |= {"mask": ["picture", 1], "grow_mask_by": 6}
    if kind.startswith("Latentd"):
        inputs = service | inputs
    else:
        loader = node("LatentdVAELoader", **service) if remote else node("VAELoader", vae_name=LOADER[family])
        nodes["vae"] = loader
        inputs["vae"] = ["vae", 0]
    nodes["work"] = node(kind, **inputs)
    if encodes:
        nodes["save"] = node("SaveLatent", samples=["work", 0], filename_prefix="latents/x")
    else:
        nodes["save"] = node("SaveImage", images=["work", 0], filename_prefix="x")
    del nodes["latents" if encodes else "picture"]
    return nodes


TILES = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
CASES = [  # family, the node with the work elsewhere, ComfyUI's own with the work here
    ("sd1", "LatentdVAEEncode", "VAEEncode"),
    ("sd1", "VAEEncode", "VAEEncode"),
    ("sd1", "VAEEncodeTiled", "VAEEncode"),
    ("sd1", "VAEEncodeForInpaint", "VAEEncodeForInpaint"),
    ("sd1", "LatentdVAEDecode", "VAEDecode"),
    ("sd1", "VAEDecode", "VAEDecode"),
    ("sd1", "VAEDecodeTiled", "VAEDecode"),
    *(
        (family, f"LatentdVAE{op}", f"VAE{op}")
        for family in ("flux", "flux2", "wan21", "taesd", "taef2")
        for op in ("Encode", "Decode")
    ),
]


def done(comfy: Comfy, work: Graph) -> Outcome:
    outcome = comfy.run(work)
    if outcome.error or not outcome.files:
        raise Failed(outcome.error or "a graph ended without a file")
    return outcome


def result(comfy: Comfy, outcome: Outcome) -> np.ndarray:
    """Latents, or pictures as whole numbers."""
    if outcome.files[0]["filename"].endswith(".latent"):
        return load(comfy.view(outcome.files[0]))["latent_tensor"]
    return comfy.pictures(outcome).astype(np.float32)


def compared(comfy: Comfy) -> Iterator[str]:
    """The rows of the table; raises Failed at the first that differs."""
    yield f"{'VAE':6} {'remote':34} {'beside (on this machine)':24} {'largest difference':28} remote   here"
    for family, ours, theirs in CASES:
        tiles = TILES if ours.endswith("Tiled") else {}
        remote, here = done(comfy, graph(family, ours, True, **tiles)), done(comfy, graph(family, theirs, False))
        a, b = result(comfy, remote), result(comfy, here)
        if a.shape != b.shape:
            raise Failed(f"{ours}, {family}: {a.shape} where {theirs} gives {b.shape}")
        worst = float(np.abs(a - b).max())
        if "Decode" in ours:
            limit, text = float(LEVELS), f"{worst:.0f} level ({np.mean(a != b):.2%} of values)"
        else:
            limit, text = float(np.abs(b).max()) * FLOAT16, f"{worst:.1e} of up to {np.abs(b).max():.2f}"
        name = ours if ours.startswith("Latentd") else f"{ours} (our loader)"
        yield f"{family:6} {name:34} {theirs:24} {text:28} {remote.seconds:5.1f} s {here.seconds:5.1f} s"
        if worst > limit or float(b.std()) == 0:
            raise Failed(f"{ours}, {family}: {worst} is more than {limit}, or there is nothing to compare")


def refused(comfy: Comfy, port: int, closed: int) -> Iterator[str]:
    """What ComfyUI's window says of a wrong address, a wrong model, wrong latents, a missing key."""
    decode = graph("sd1", "LatentdVAEDecode", True)
    other = graph("flux", "LatentdVAEDecode", True)
    cases = [
        ("no service", decode, {"url": f"http://127.0.0.1:{closed}"}, "cannot be reached"),
        ("no such model", decode, {"model": "nobody"}, "nobody"),
        ("latents of another VAE", other, {"model": "sd1"}, "belong to another VAE"),
        # Another name of this machine is another host: the key stays here.
        ("not LATENTD_URL", decode, {"url": f"http://localhost:{port}"}, "LATENTD_KEY is for LATENTD_URL alone"),
        ("a key in the address", decode, {"url": f"http://x:{KEY}@localhost:{port}"}, "put the key into LATENTD_KEY"),
    ]
    for name, work, inputs, expected in cases:
        wrong = work | {"work": node(**{"kind": "LatentdVAEDecode"} | work["work"]["inputs"] | inputs)}
        error = comfy.run(wrong).error
        yield f"{name:24} {error}"
        if expected not in error:
            raise Failed(f"{name}: {expected!r} was expected")


def interrupted(comfy: Comfy, log: Path) -> str:
    """Cancel ends a long decode at once, and the service is told."""
    work = graph("sd1", "LatentdVAEDecode", True)
    work["latents"] = node("LoadLatent", latent="long.latent")
    prompt = comfy.queue(work)
    end = time.monotonic() + PROMPT_SECONDS
    while not comfy.get("/queue")["queue_running"] and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.5)  # into the service's own work
    start = time.monotonic()
    comfy.http.post("/interrupt").raise_for_status()
    outcome = comfy.ended(prompt)
    seconds = time.monotonic() - start
    if not outcome.interrupted or seconds > 1:
        raise Failed(f"Cancel took {seconds:.1f} s; interrupted: {outcome.interrupted}, {outcome.error}")
    while "client_gone" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    if "client_gone" not in log.read_text():
        raise Failed("the service did not notice that the connection was dropped")
    return f"Cancel ended the wait after {seconds * 1e3:.0f} ms, and the service logged client_gone"


def write_inputs(folder: Path) -> None:
    """A picture of an odd size with a hole in its alpha, which is ComfyUI's mask, and latents of each VAE."""
    folder.mkdir()
    with Image.open(ROOT / "tests" / "pictures" / "astronaut.png") as source:
        picture = source.convert("RGBA").resize((WIDTH, HEIGHT))
    hole = np.full((HEIGHT, WIDTH), 255, np.uint8)
    hole[40:100, 60:140] = 0
    picture.putalpha(Image.fromarray(hole))
    picture.save(folder / "picture.png")
    draw = np.random.default_rng(0)
    for name, shape in {**SHAPES, "long": (1, 4, LONG, LONG)}.items():
        latents = draw.standard_normal(shape).astype(np.float32)
        marker = np.zeros(0, np.float32)  # of the newer of the two kinds of file
        save_file({"latent_tensor": latents, "latent_format_version_0": marker}, folder / f"{name}.latent")


def python_of(source: Path) -> Path:
    """The interpreter that ComfyUI was installed with, where it lies beside its source; else this one."""
    places = [folder / name / "bin" / "python" for folder in (source, source.parent) for name in ("venv", ".venv")]
    return next((place for place in places if place.exists()), Path(sys.executable))


def check(source: Path, python: Path, base: Path) -> None:
    write_models(base / "models")
    write_inputs(base / "input")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "latentd").symlink_to(ROOT / "clients" / "comfyui")
    port, comfy_port, closed = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{comfy_port}"
    log = base / "latentd.log"
    with (
        latentd(base / "models", port, log, api_keys=KEY, default_model="sd1", drain_seconds="1"),
        comfyui(source, python, base, comfy_port, base / "comfyui.log", url=f"http://127.0.0.1:{port}", key=KEY),
    ):
        comfy = Comfy(url)
        print(f"ComfyUI {comfy.get('/system_stats')['system']['comfyui_version']}, random weights, {WIDTH}x{HEIGHT}")
        if (names := comfy.get("/api/latentd/models")["models"]) != sorted(SHAPES):
            raise Failed(f"the list of models is {names}")
        for line in compared(comfy):
            print(line, flush=True)
        for line in refused(comfy, port, closed):
            print(line, flush=True)
        print(interrupted(comfy, log))
    for path in (base / "output").rglob("*"):
        if path.is_file() and KEY.encode() in path.read_bytes():
            raise Failed(f"the key is in {path.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path, help="the folder with ComfyUI's main.py")
    parser.add_argument("--python", type=Path, help="ComfyUI's interpreter; absent: of the venv beside it")
    parser.add_argument("--keep", type=Path, help="an empty folder for what is written, which is kept")
    args = parser.parse_args()
    source: Path = args.comfyui.resolve()
    if not (source / "main.py").is_file():
        print(f"comfyui: no main.py in {source}: give the folder of a ComfyUI that runs", file=sys.stderr)
        return 2
    python = args.python or python_of(source)
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, terminated)  # both programs are stopped then, too
    try:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            check(source, python, args.keep.resolve())
        else:
            with tempfile.TemporaryDirectory() as folder:
                check(source, python, Path(folder))
    except (Failed, RuntimeError) as error:
        print(f"comfyui: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
