"""Fits linear maps from latents to small pictures, and applies them: numpy alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from app.errors import InvalidLatent
from app.store.linear import Linear

SIDE = 256  # pixels of the pictures that a map is fitted to
RIDGE = 1e-4
"""Beside channels of about unit variance: keeps channels that hardly vary from being blown up."""

ALONE = 1 << 18
"""Multiplications that OpenBLAS does in the calling thread (its GEMM_MULTITHREAD_THRESHOLD of 4, times 2^16): a product
as small as a preview's only waits for the others, 28 ms instead of 1.3 where every core is busy."""


def fit(latents: Sequence[np.ndarray], pictures: Sequence[np.ndarray], patch: int) -> Linear:
    """The map by least squares from latents (C, h, w) to the colours of what they decode to, averaged on the grid.

    Pictures are uint8 (H, W, 3), or with alpha (H, W, 4). `patch` is how many positions of the grid a latent's position
    has on a side. The error is that on pictures that the map was not fitted to: each is left out once.
    """
    inputs = [_rows(latent) for latent in latents]
    targets = [
        _blocks(_averaged(picture, latent, patch), patch) for picture, latent in zip(pictures, latents, strict=True)
    ]
    errors = []
    for index in range(len(inputs)):
        rest = [each for each in range(len(inputs)) if each != index]
        weights = _solve([inputs[each] for each in rest], [targets[each] for each in rest])
        errors.append(np.mean(np.square((inputs[index] @ weights).clip(0, 1) - targets[index])))
    return Linear(_solve(inputs, targets).astype(np.float32), decibel(float(np.mean(errors))))


def apply(linear: Linear, latent: np.ndarray) -> npt.NDArray[np.uint8]:
    """A latent (C, h, w) as a picture of its grid: uint8 (h p, w p, 3). Raises InvalidLatent for other channels."""
    channels, height, width = latent.shape
    if channels != linear.channels:
        raise InvalidLatent(f"the preview's map takes {linear.channels} channels, the latent has {channels}")
    flat = latent.reshape(channels, -1)
    weights = np.ascontiguousarray(linear.weights[:-1].T) * np.float32(255)
    constant = linear.weights[-1][:, None] * np.float32(255) + np.float32(0.5)
    out = np.empty((len(weights), flat.shape[1]), np.uint8)
    step = max(1, ALONE // weights.size)
    for start in range(0, flat.shape[1], step):
        colours = weights @ flat[:, start : start + step].astype(np.float32)
        colours += constant
        out[:, start : start + step] = colours.clip(0, 255, out=colours)
    patch = round((len(out) / 3) ** 0.5)
    out = out.reshape(patch, patch, 3, height, width)
    picture: npt.NDArray[np.uint8] = out.transpose(3, 0, 4, 1, 2).reshape(height * patch, width * patch, 3)
    return picture


def decibel(mean_square: float) -> float:
    """PSNR of a mean squared error of values from 0 to 1; of none at all 99."""
    return 99.0 if mean_square <= 0 else min(99.0, float(-10 * np.log10(mean_square)))


def _rows(latent: np.ndarray) -> np.ndarray:
    """(C, h, w) -> (h w, C + 1), the last column a constant."""
    flat = latent.reshape(len(latent), -1).T.astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def _averaged(picture: np.ndarray, latent: np.ndarray, patch: int) -> np.ndarray:
    """uint8 (H, W, 3 or 4) -> (h p, w p, 3) from 0 to 1."""
    height, width = latent.shape[1] * patch, latent.shape[2] * patch
    side = picture.shape[0] // height
    colours = picture[..., :3].reshape(height, side, width, side, 3)
    averaged: np.ndarray = colours.mean(axis=(1, 3)) / 255
    return averaged


def _blocks(picture: np.ndarray, patch: int) -> np.ndarray:
    """(h p, w p, 3) -> (h w, p p 3): as `apply` lays them out."""
    height, width = picture.shape[0] // patch, picture.shape[1] // patch
    return picture.reshape(height, patch, width, patch, 3).transpose(0, 2, 1, 3, 4).reshape(height * width, -1)


def _solve(inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
    """Ridge regression, the constant not shrunk: (C + 1, 3 p^2)."""
    a, b = np.concatenate(inputs), np.concatenate(targets)
    square = a.T @ a
    ridge = RIDGE * len(a) * np.eye(len(square))
    ridge[-1, -1] = 0
    return np.linalg.solve(square + ridge, a.T @ b)
