"""`python -m benchmarks.seams`: docs/tiling-difference.png, what tiles do to a picture, on the embedded default VAE.

One latent is decoded whole, in strips, by recompute, and by diffusers with `enable_tiling()`; each difference to the
same program's untiled run is amplified around mid grey. diffusers' tiles are half as wide as the picture, as 512 px
tiles are of one of 1024 px.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from app.execution.banded import RECOMPUTE, STRIPS, gather
from app.execution.primitive import Whole
from app.store.checkpoint import load_autoencoder
from app.store.store import open_checkpoint
from app.tools.convert import Output, convert

ROOT = Path(__file__).parent.parent
AMPLIFIED = 8
FURTHER = 10_000  # ours has nothing to show at AMPLIFIED
LABEL = 28


def levels(delta: Tensor, factor: float) -> np.ndarray:
    """A difference of pictures in [-1, 1], amplified, as a picture around mid grey."""
    grey = (delta[0].permute(1, 2, 0) * 127.5 * factor + 127.5).round().clamp(0, 255)
    array: np.ndarray = grey.to(torch.uint8).numpy()
    return array


def amplified(delta: Tensor, factor: float, name: str) -> tuple[np.ndarray, str]:
    """A difference as a picture, and what stands above it, in characters that Pillow's font has: no ×."""
    most = delta.abs().max().item() * 127.5
    rms = delta.square().mean().sqrt().item() * 127.5
    return levels(delta, factor), f"{name}, {factor:g}x: at most {most:.2g}, RMS {rms:.2g} of 255 levels"


def main() -> None:
    from diffusers import AutoencoderKL as Peer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=ROOT / "tests/pictures/astronaut.png")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/tiling-difference.png")
    args = parser.parse_args()
    checkpoint = open_checkpoint(ROOT / "models/VAE/latentd-small.safetensors")
    module = load_autoencoder(checkpoint, torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "vae"
        convert(checkpoint, Output(target, layout="diffusers", dtype=torch.float32))
        theirs = Peer.from_pretrained(target).eval()
    image = np.array(Image.open(args.picture).convert("RGB"))
    side = image.shape[1] // 2
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = side, side // 8
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        z = module.posterior(module.encode(Whole(), pixels)).mode()
        whole = gather(Whole(), module.decode, z)
        untiled = theirs.decode(z).sample
        theirs.enable_tiling()
        tiled = theirs.decode(z).sample
        ours = {str(each): gather(each, module.decode, z) for each in (STRIPS, RECOMPUTE)}
    panels = [
        (levels(whole, 1), "decoded whole"),
        amplified(tiled - untiled, AMPLIFIED, f"diffusers, {side} px tiles"),
        amplified(ours["strips"] - whole, AMPLIFIED, "latentd, strips"),
        amplified(ours["recompute"] - whole, FURTHER, "latentd, recompute"),
    ]
    height, width, _ = image.shape
    sheet = Image.new("RGB", (2 * width + 8, 2 * (height + LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, (panel, label) in enumerate(panels):
        left, top = index % 2 * (width + 8), index // 2 * (height + LABEL)
        sheet.paste(Image.fromarray(panel), (left, top + LABEL))
        draw.text((left + 2, top + 5), label, "black", font)
        print(label)
    sheet.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
