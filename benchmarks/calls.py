"""The requests of a load: good and bad ones, of mixed models, sizes and operations, from one seed."""

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tests.store.weights import state_of, write

MODELS = {"kl-a": ("sd1", 1), "kl-b": ("sd1", 2), "tiny": ("taesd", 3)}  # name: family, seed
SIDES = (32, 64, 96, 128)

Kind = Literal["good", "bad", "late", "leaving"]
WEIGHTS: dict[Kind, int] = {"good": 70, "bad": 15, "late": 8, "leaving": 7}
HONEST: dict[Kind, set[int]] = {"good": {200, 429}, "late": {200, 429, 504}, "leaving": {200, 429}, "bad": set()}


@dataclass(frozen=True)
class Call:
    """One request, and what may come of it."""

    kind: Kind
    op: str
    query: dict[str, str]
    body: bytes
    expected: frozenset[int]
    patience: float | None = None  # seconds until the client goes


def latent(rng: random.Random, side: int) -> np.ndarray:
    """Random latents of a picture of side x side."""
    generator = np.random.default_rng(rng.getrandbits(32))
    return generator.standard_normal((1, 4, side // 8, side // 8)).astype(np.float16)


def npy(array: np.ndarray) -> bytes:
    """The file that numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png(rng: random.Random, side: int) -> bytes:
    """A random picture."""
    file = io.BytesIO()
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def bad_calls(rng: random.Random) -> list[Call]:
    """Requests that nobody can serve."""
    model = {"model": rng.choice(list(MODELS))}
    cases: list[tuple[str, dict[str, str], bytes, int]] = [
        ("encode", model, b"no picture at all", 415),
        ("encode", model, png(rng, 32)[:40], 400),
        ("encode", {"model": "nobody"}, png(rng, 32), 404),
        ("encode", {}, png(rng, 32), 422),  # several models, none named
        ("decode", model, npy(latent(rng, 32)[:, :3]), 422),
        ("decode", model, npy(np.full((1, 4, 4, 4), np.nan, np.float16)), 422),
        ("decode", {**model, "tiling": "sometimes"}, npy(latent(rng, 32)), 422),
        ("decode", model, b"\x93NUMPY nonsense", 400),
    ]
    # 429: room is asked for before any pixel or number of the body is read.
    return [Call("bad", op, query, body, frozenset({status, 429})) for op, query, body, status in cases]


def calls(count: int, rng: random.Random) -> list[Call]:
    """The mixture."""
    made = []
    for kind in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count):
        if kind == "bad":
            made.append(rng.choice(bad_calls(rng)))
            continue
        op, side = rng.choice(("encode", "decode")), rng.choice(SIDES)
        body = png(rng, side) if op == "encode" else npy(latent(rng, side))
        query = {"model": rng.choice(list(MODELS))}
        if rng.random() < 0.1:
            query["tiling"] = "always"
        if rng.random() < 0.1:
            query["deterministic"] = "true"
        patience = rng.uniform(0.0, 0.2) if kind == "leaving" else None
        made.append(Call(kind, op, query, body, frozenset(HONEST[kind]), patience))
    return made


def write_models(folder: Path) -> None:
    """Small random models."""
    for name, (family, seed) in MODELS.items():
        write(folder / f"{name}.safetensors", state_of(family, seed))


def array_of(op: str, content: bytes) -> np.ndarray:
    """The numbers of an answer: pixels of a decoded picture, or latents."""
    if op == "decode":
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image)
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array
