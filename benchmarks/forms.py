"""`python -m benchmarks.forms`: every file form, layout and dtype beside diffusers; then what hostile files are told.

Prints the tables of docs/models.md. The first compares float32 runs of the weights as stored with diffusers'
AutoencoderKL of the same weights, at SD's architecture with a quarter of its width and, with `--full`, at SD's width.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL as Reference
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.execution.primitive import Whole
from app.store.checkpoint import load_autoencoder
from app.store.store import open_checkpoint
from app.vae.architectures import ARCHITECTURES
from app.weights.files import open_weights
from benchmarks.pairs import table
from tests.store.hostile import CORPUS, Hostile
from tests.store.lightning import save_lightning
from tests.store.weights import write

State = dict[str, Tensor]
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NARROW, FULL = (32, 64, 128, 128), (128, 256, 512, 512)
PIXELS = 64  # a side of the picture
ADVICE = ", and a file that calls functions could run code here; save its tensors alone, best as .safetensors"


# ---------------------------------------------------------------------------------------------------- layouts and forms
def ldm(state: State) -> State:
    """LDM's names; its attention is of 1x1 convolutions."""
    row = ARCHITECTURES["kl"]
    return {name: state[key].reshape(row.shape(name, tuple(state[key].shape))) for key, name in row.keys(state).items()}


def baked(state: State) -> State:
    """LDM's names in a full checkpoint, beside some tensors of its other networks."""
    dtype = next(iter(state.values())).dtype
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3, dtype=dtype),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.linspace(0, 1, 1000),
    }
    return others | {f"first_stage_model.{key}": value for key, value in ldm(state).items()}


def older(state: State) -> State:
    """The names of diffusers before 0.17."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(key: str) -> str:
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        return key

    return {renamed(key): value for key, value in state.items()}


LAYOUTS: Mapping[str, Callable[[State], State]] = {
    "LDM": ldm,
    "`first_stage_model.` of a full checkpoint": baked,
    "diffusers": lambda state: state,
    "diffusers, old names": older,
}


def tensors(path: Path, state: State) -> None:
    """safetensors, whatever the suffix."""
    write(path.with_suffix(".safetensors"), state).rename(path)


def pickled(path: Path, state: State) -> None:
    """torch.save's zip file; a .ckpt has the tensors one level down."""
    torch.save({"epoch": 3, "state_dict": state} if path.suffix == ".ckpt" else state, path)


def run_of_pickles(path: Path, state: State) -> None:
    """torch.save before 1.6."""
    torch.save({"epoch": 3, "state_dict": state}, path, _use_new_zipfile_serialization=False)


FORMS: Mapping[str, tuple[str, Callable[[Path, State], None]]] = {
    "`.safetensors`": ("x.safetensors", tensors),
    "`.sft`": ("x.sft", tensors),
    "`.ckpt` (zip)": ("x.ckpt", pickled),
    "`.ckpt` (before torch 1.6)": ("x.ckpt", run_of_pickles),
    "`.pt`": ("x.pt", pickled),
    "`.pth`": ("x.pth", pickled),
    "`.bin`": ("x.bin", pickled),
    "`.ckpt` of Lightning": ("x.ckpt", save_lightning),
    "`.ckpt` of Lightning (before torch 1.6)": ("x.ckpt", lambda path, state: save_lightning(path, state, older=True)),
}


# ----------------------------------------------------------------------------------------------------------- comparison
class Peer:
    """diffusers' network of some widths with random weights as a dtype stores them, and what it computes in float32."""

    def __init__(self, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        blocks = len(widths)
        self.network = Reference(
            block_out_channels=widths,
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
        ).eval()
        self.network = self.network.to(dtype)
        self.state: State = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.network = self.network.float()
        self.pixels = torch.rand(1, 3, PIXELS, PIXELS) * 2 - 1
        self.mean: Tensor = self.network.encode(self.pixels).latent_dist.mode()
        self.decoded: Tensor = self.network.decode(self.mean).sample

    def differences(self, path: Path) -> tuple[float, float]:
        """Largest absolute differences of the decoded picture and of the latents' mean, from a file."""
        module = load_autoencoder(open_checkpoint(path, "sd1"), torch.float32, CPU)
        mean = module.encode(Whole(), self.pixels)[:, : self.mean.shape[1]]
        decoded = module.decode(Whole(), self.mean)
        return (decoded - self.decoded).abs().max().item(), (mean - self.mean).abs().max().item()


def folder(peer: Peer, path: Path, dtype: torch.dtype, safe: bool) -> Path:
    """What diffusers itself saves."""
    peer.network.to(dtype).save_pretrained(path, safe_serialization=safe)
    peer.network.float()
    return path


def largest(found: Iterable[tuple[float, float]]) -> str:
    """A cell: the largest differences, of the picture and of the mean."""
    return " / ".join(f"{max(values):.1e}" for values in zip(*found, strict=True))


def rows(peers: Mapping[str, Peer], layouts: Mapping[str, Callable[[State], State]]) -> Iterator[list[str]]:
    """One row for each form, one cell for each layout: the largest differences over the dtypes."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for form, (name, save) in FORMS.items():
            cells = []
            for arrange in layouts.values():
                found = []
                for peer in peers.values():
                    save(place / name, arrange(peer.state))
                    found.append(peer.differences(place / name))
                    (place / name).unlink()
                cells.append(largest(found))
            yield [form, *cells]
        for form, safe in (("folder of diffusers", True), ("folder of diffusers, `.bin`", False)):
            found = [
                peer.differences(folder(peer, place / f"{dtype}{safe}", DTYPES[dtype], safe))
                for dtype, peer in peers.items()
            ]
            yield [form, *(largest(found) if layout == "diffusers" else "" for layout in layouts)]


def scale(peer: Peer) -> str:
    """How large the values are that the differences are of."""
    return f"standard deviation of the picture {peer.decoded.std():.2f}, of the mean {peer.mean.std():.2f}"


# -------------------------------------------------------------------------------------------------------- hostile files
def peak() -> int:
    """Bytes of this process's largest resident set since clear_peak(); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def clear_peak() -> None:
    """Begins a new measurement of the peak: proc(5), /proc/pid/clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def attack(case: Hostile, path: Path) -> list[str]:
    """One row: the file, what it tries, what it is told, in how long and with how much memory."""
    path.write_bytes(case.build())
    clear_peak()
    before, start = peak(), time.perf_counter()
    try:
        open_weights(path)
        told = "loaded"
    except UnsupportedCheckpoint as error:
        told = str(error)
    seconds, memory = time.perf_counter() - start, peak() - before
    took = f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
    told = told.replace(ADVICE, " …").replace("|", "\\|")
    return [case.name, case.tries, told, took, f"{memory / 2**20:.0f} MiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also at SD's own width, fp16: a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    with torch.inference_mode():
        peers = {name: Peer(NARROW, dtype) for name, dtype in DTYPES.items()}
        print(f"Widths {NARROW}, {PIXELS} px; {scale(peers['fp32'])}\n")
        print(table(["form", *LAYOUTS], rows(peers, LAYOUTS)), flush=True)
        if arguments.full:
            chosen = {name: LAYOUTS[name] for name in ("LDM", "diffusers")}
            peers = {"fp16": Peer(FULL, torch.float16)}
            print(f"\nWidths {FULL}, {PIXELS} px; {scale(peers['fp16'])}\n")
            print(table(["form", *chosen], rows(peers, chosen)), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        results = [attack(case, Path(temporary) / "x.ckpt") for case in CORPUS]
    print("\n" + table(["file", "tries", "is told", "time", "memory"], results))


if __name__ == "__main__":
    main()
