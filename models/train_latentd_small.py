"""Trains latentd-small, the embedded default VAE: `make train`, about two hours on two CPU cores.

Pictures: the freely licensed test images inside the scikit-image and scikit-learn wheels, and procedural ones drawn
here. Held out, never trained on: china.jpg (scikit-learn), coffee.png and astronaut.png (scikit-image).
Writes models/VAE/latentd-small.safetensors (LDM keys, float16) and prints the held-out PSNR at 256 px.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from app.allocator import keep_pages
from app.execution.primitive import Whole
from app.vae.autoencoder_kl import AutoencoderKL, KLConfig

CONFIG = KLConfig(
    encoder_widths=(32, 64, 96, 128),
    decoder_widths=(32, 64, 96, 128),
    encoder_depth=1,
    decoder_depth=2,
    latent_channels=4,
    norm_groups=8,
)
SKIMAGE = Path(skimage.data.__file__).parent
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
HELD_OUT = (SKLEARN / "china.jpg", SKIMAGE / "coffee.png", SKIMAGE / "astronaut.png")
# (file, weight): how often a crop is taken from it
TRAINING = (
    (SKLEARN / "flower.jpg", 5),
    (SKIMAGE / "chelsea.png", 5),
    (SKIMAGE / "rocket.jpg", 5),
    (SKIMAGE / "motorcycle_left.png", 5),
    (SKIMAGE / "motorcycle_right.png", 4),
    (SKIMAGE / "hubble_deep_field.jpg", 1),
    (SKIMAGE / "retina.jpg", 1),
    (SKIMAGE / "ihc.png", 2),
    (SKIMAGE / "camera.png", 4),
    (SKIMAGE / "coins.png", 2),
    (SKIMAGE / "brick.png", 1),
    (SKIMAGE / "grass.png", 1),
    (SKIMAGE / "gravel.png", 1),
    (SKIMAGE / "moon.png", 1),
    (SKIMAGE / "text.png", 1),
    (SKIMAGE / "page.png", 1),
)
FINISHING = 0.8  # of the steps: from here on the end game
PROCEDURAL = 64
PROCEDURAL_WEIGHT = 10


def picture(path: Path) -> Tensor:
    """The file as float (3, H, W) in [-1, 1]."""
    array = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def procedural(generator: torch.Generator, size: int = 256) -> Tensor:
    """A drawn picture (3, size, size) in [-1, 1]: smooth colour fields, discs, boxes, stripes and grain."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    coarse = int(rand(1) * 6) + 2
    field = F.interpolate(rand(1, 3, coarse, coarse), size=(size, size), mode="bicubic", align_corners=False)[0]
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    for _ in range(int(rand(1) * 14)):
        colour, (cx, cy, r, kind, angle) = rand(3, 1, 1), rand(5).tolist()
        u = (x - cx) * math.cos(6.3 * angle) + (y - cy) * math.sin(6.3 * angle)
        v = (y - cy) * math.cos(6.3 * angle) - (x - cx) * math.sin(6.3 * angle)
        r = 0.02 + 0.3 * r * r
        if kind < 0.4:
            mask = u**2 + v**2 < r**2
        elif kind < 0.75:
            mask = (u.abs() < r) & (v.abs() < r * (0.1 + cx))
        else:
            mask = (torch.sin(u * (20 + 200 * r)) > 0) & (u**2 + v**2 < 2 * r)
        shade = colour + 0.3 * (u / max(r, 1e-3)).clamp(-1, 1) * (rand(1) - 0.5)
        field = torch.where(mask, shade, field)
    grain = F.interpolate(rand(1, 1, size // 2, size // 2), size=(size, size), mode="bilinear")[0] - 0.5
    return (field + 0.15 * rand(1) * grain).clamp(0, 1) * 2 - 1


class Crops:
    """An endless source of training crops (n, 3, side, side): any picture, any scale, flipped, recoloured.

    From so few pictures a network learns their colours and no others; tints and swapped channels prevent it.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        drawn = [procedural(self.generator) for _ in range(PROCEDURAL)]
        self.pictures = [picture(path) for path, _ in TRAINING] + drawn
        weights = [float(weight) for _, weight in TRAINING] + [PROCEDURAL_WEIGHT / PROCEDURAL] * PROCEDURAL
        self.weights = torch.tensor(weights)

    def one(self, side: int) -> Tensor:
        index = int(torch.multinomial(self.weights, 1, generator=self.generator))
        image = self.pictures[index]
        u = torch.rand(8, generator=self.generator).tolist()
        limit = min(image.shape[1:])
        region = min(limit, int(side * (limit / side) ** (0.9 * u[0])))  # log-uniform in scale
        top = int(u[1] * (image.shape[1] - region + 1))
        left = int(u[2] * (image.shape[2] - region + 1))
        crop = image[:, top : top + region, left : left + region]
        if region != side:
            crop = F.interpolate(crop[None], size=(side, side), mode="bilinear", antialias=True)[0]
        if u[3] < 0.5:
            crop = crop.flip(2)
        if u[4] < 0.25:
            crop = crop.transpose(1, 2)
        grey = bool((crop[0] == crop[1]).all())
        if grey or u[5] < 0.25:  # a tint: grey pictures would teach the network that chroma is nothing
            strength = 0.5 if grey else 0.2
            gain = 1 + strength * (torch.rand(3, 1, 1, generator=self.generator) - 0.5) * 2
            shift = strength * (torch.rand(3, 1, 1, generator=self.generator) - 0.5)
            crop = (crop * gain + shift).clamp(-1, 1)
        if u[6] < 0.3:
            crop = crop[torch.randperm(3, generator=self.generator)]
        return crop

    def batch(self, n: int, side: int) -> Tensor:
        crops = torch.stack([self.one(side) for _ in range(n)])
        return crops.contiguous(memory_format=torch.channels_last)


def held_out(path: Path, side: int = 256) -> Tensor:
    """The centre square of a picture, resized to (1, 3, side, side) in [-1, 1]."""
    image = Image.open(path).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


@torch.inference_mode()
def psnr(model: AutoencoderKL) -> list[float]:
    """Round-trip PSNR in dB of each held-out picture, on 8-bit values."""
    values = []
    for path in HELD_OUT:
        image = held_out(path)
        mean = model.encode(Whole(), image)[:, : CONFIG.latent_channels]
        out = model.decode(Whole(), mean)
        error = ((out.clamp(-1, 1) + 1) * 127.5).round() - (image + 1) * 127.5
        values.append(10 * math.log10(255**2 / error.square().mean().item()))
    return values


def chroma(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)


def reconstruction_loss(out: Tensor, target: Tensor, chroma_weight: float, finishing: bool) -> Tensor:
    """|d| + 6 d^2, and while `chroma_weight` lasts the colour alone, pooled and at full resolution; at the end 12 d^2.

    From a random start a network settles on grey pictures for thousands of steps; the colour term prevents that.
    """
    difference = out - target
    if finishing:
        return 12 * difference.square().mean()
    loss = difference.abs().mean() + 6 * difference.square().mean()
    if chroma_weight > 0:
        colour = chroma(difference)
        loss = loss + chroma_weight * (F.avg_pool2d(colour, 8).abs().mean() * 2 + colour.abs().mean())
    return loss


@torch.no_grad()
def unit_variance(model: AutoencoderKL, crops: Crops) -> float:
    """Folds the latents' standard deviation into the 1x1 convolutions, so that the scale factor is 1; returns it."""
    z = CONFIG.latent_channels
    means = [model.encode(Whole(), crops.batch(8, 128))[:, :z] for _ in range(8)]
    std = torch.cat(means).std().item()
    assert model.quant_conv is not None and model.post_quant_conv is not None
    model.quant_conv.weight[:z] /= std
    model.quant_conv.bias[:z] /= std  # type: ignore[index]  # nn.Conv2d was built with a bias
    model.quant_conv.bias[z:] -= 2 * math.log(std)  # type: ignore[index]  # log-variance
    model.post_quant_conv.weight *= std
    return std


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    crops = Crops(args.seed)
    z = CONFIG.latent_channels
    model: AutoencoderKL = AutoencoderKL(CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert model.quant_conv is not None
    with torch.no_grad():  # begin near the posterior's mode: noise of exp(-2.5) = 0.08
        model.quant_conv.weight[z:] = 0
        model.quant_conv.bias[z:] = -5  # type: ignore[index]
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    start, first = time.monotonic(), 0
    if args.resume and args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        crops.generator.set_state(state["crops"])
        first = state["step"]
    for step in range(first, args.steps):
        progress = step / args.steps
        rate = args.lr * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        # The end on larger crops, whose norms see what whole pictures will give them.
        finishing = progress >= FINISHING
        side, n = (128, 4) if finishing else (64, 12)
        images = crops.batch(n, side)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.encode(Whole(), images).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            noisy = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            out = model.decode(Whole(), noisy).float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(out, images, max(0.0, 1 - step / 1500), finishing) + 1e-4 * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            values = psnr(average)
            print(
                f"step {step + 1} loss {loss.item():.4f} held out {' '.join(f'{v:.2f}' for v in values)}"
                f" mean {sum(values) / 3:.2f} dB, latent std {mean.std().item():.2f},"
                f" noise {(0.5 * logvar).exp().mean().item():.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "crops": crops.generator.get_state(),
                    "step": step + 1,
                },
                partial := args.state.with_suffix(".partial"),
            )
            partial.replace(args.state)  # an interrupted save must not cost the one before it
    std = unit_variance(average, crops)
    tensors = {key: value.half().contiguous() for key, value in average.state_dict().items()}
    metadata = {"format": "pt", "family": "latentd-small", "norm_num_groups": str(CONFIG.norm_groups)}
    save_file(tensors, args.out, metadata=metadata)
    average.load_state_dict(tensors)
    values = psnr(average)
    print(f"{args.out}: {' '.join(f'{v:.2f}' for v in values)} mean {sum(values) / 3:.2f} dB, folded std {std:.3f}")


def main() -> None:
    keep_pages()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10500)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("models/VAE/latentd-small.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("latentd-small.state"), help="optimizer state, for --resume")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
