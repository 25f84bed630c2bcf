"""ComfyUI's pictures and latents, and the service's: tensors here, arrays there."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

CHANNELS = 3  # of a picture at least; a fourth is alpha
LEVEL = 255
NEAR = 1e-3  # of a level: what float32 leaves of n / 255 * 255


@dataclass(frozen=True)
class Convention:
    """How the latents that travel in ComfyUI's graphs are told to the service."""

    latents: Literal["raw", "scaled"] = "raw"
    patch: int = 1  # raw latent positions along one side that ComfyUI has as one
    scale: float = 1.0  # of the diffusion model that a tiny autoencoder stands in for:
    shift: float = 0.0  # ComfyUI's latents are always as the full one has them, a tiny one's are scaled
    frames: bool = False  # whether ComfyUI's have them, one for a picture: (N, C, 1, h, w)


CONVENTIONS = {
    "flux2": Convention("scaled", patch=2),  # normalised and folded, as the network's BatchNorm leaves them
    "taef2": Convention("scaled", patch=2),
    "taesd": Convention("scaled", scale=0.18215),
    "taesdxl": Convention("scaled", scale=0.13025),
    "taesd3": Convention("scaled", scale=1.5305, shift=0.0609),
    "taef1": Convention("scaled", scale=0.3611, shift=0.1159),
    "wan21": Convention(frames=True),
    "wan22": Convention(frames=True),
}
RAW = Convention()  # of every other family


def to_service(latents: Tensor, convention: Convention) -> np.ndarray:
    """float32 (N, C, h, w)."""
    scaled = (latents.detach().float() - convention.shift) * convention.scale
    return scaled.cpu().numpy()


def from_service(latents: np.ndarray, convention: Convention) -> Tensor:
    """The way back."""
    return torch.from_numpy(latents).float() / convention.scale + convention.shift


def cropped(pixels: Tensor, multiple: int, channels: int = CHANNELS) -> Tensor:
    """The middle of pictures (N, H, W, C), sides cut to multiples, and at most so many channels: 3 are the colours.

    Raises ValueError for what is no such picture, or is smaller than one latent position.
    """
    if pixels.ndim != 4 or pixels.shape[-1] < CHANNELS:
        raise ValueError(f"pictures are (N, H, W, {CHANNELS}), not {tuple(pixels.shape)}")
    for side in (1, 2):
        whole, rest = divmod(pixels.shape[side], multiple)
        if whole == 0:
            raise ValueError(f"a picture of {pixels.shape[2]}x{pixels.shape[1]} is smaller than {multiple} pixels")
        pixels = pixels.narrow(side, rest // 2, whole * multiple)
    return pixels[..., :channels]


def picture_array(pixels: Tensor) -> np.ndarray:
    """Pictures (N, H, W, C) in [0, 1] as they travel, nothing lost that counts and no more bytes than that takes.

    uint8 (N, H, W, C) where every value is a level of 255, as after loading a file; else float16 (N, C, H, W) in
    [-1, 1].
    """
    pixels = pixels.detach().float().cpu()
    levels = pixels * LEVEL
    whole = levels.round()
    if ((levels - whole).abs() < NEAR).all() and whole.amin() >= 0 and whole.amax() <= LEVEL:
        return whole.to(torch.uint8).numpy()
    return (pixels * 2 - 1).movedim(-1, 1).half().numpy()


def pictures_of(array: np.ndarray) -> Tensor:
    """Pictures float32 (N, H, W, C) in [0, 1] of what the service sends: black -1, white 1, unclamped."""
    return ((torch.from_numpy(array).float() + 1) / 2).clamp_(0, 1)
