"""What is fuzzed: each reader of bytes from outside, the one error that it may raise, and what must hold else."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from app.api.door.form import parts_of
from app.errors import InvalidInput, ServiceError, UnsupportedCheckpoint
from app.weights.archives import read_archive, span_of, state_dict
from app.weights.safetensors import read_safetensors
from app.wire.arrays.latents import latent_shape, read_latents
from app.wire.headers import PictureHeader
from app.wire.pixels import pixels_header, read_pixels
from tests.fuzz import seeds
from tests.store.hostile import zipped

MOST_PIXELS = 1 << 18
"""Of a picture that is decoded: what costs time beyond it is the codec's, and is looked at with a budget elsewhere."""
MOST_BYTES = 1 << 22
MOST_ITEMS = 256
"""As the service's own limit of pictures in one request, which stands between the header and the data."""


@dataclass(frozen=True)
class Target:
    """A reader."""

    read: Callable[[bytes], None]
    """Raises `refusal` for what is not sound, and AssertionError where it does not keep its word."""
    refusal: type[ServiceError]
    seeds: Callable[[], Iterator[bytes]]

    def try_on(self, body: bytes) -> bool:
        """Whether the body is taken; any error but a refusal is a defect, and so is one that cannot be shown."""
        try:
            self.read(body)
        except self.refusal as error:
            reason = str(error)
        else:
            return True
        assert 0 < len(reason.encode()) < 2000
        return False


def _latents(body: bytes) -> None:
    declared = latent_shape(body)
    if declared.batch > MOST_ITEMS:
        return
    items = read_latents(body, max_bytes=MOST_BYTES).items
    assert [item.shape for item in items] == declared.shapes
    assert all(item.dtype == declared.dtype and np.isfinite(item).all() for item in items)
    assert sum(item.nbytes for item in items) <= declared.work


def _pixels(body: bytes) -> None:
    header = pixels_header(body)
    width, height = header.size
    assert min(width, height, header.count, header.frames) >= 1
    if isinstance(header.declared, PictureHeader):
        kept = header.declared.kept
        assert all(isinstance(part, bytes) or 0 <= part.start <= part.stop <= len(body) for part in kept)
        assert header.work <= 2 * len(body) + 4096 + 24 * width * height
    if width * height > MOST_PIXELS or header.count > MOST_ITEMS:
        return
    for background, channels in (((255, 255, 255), 4 if header.alpha else 3), (None, 4)):
        pictures = read_pixels(body, header, background=background, max_pixels=MOST_PIXELS)
        assert [each.shape for each in pictures] == [(height, width, channels)] * header.count


def _archive(body: bytes) -> None:
    file: io.BufferedReader = io.BufferedReader(io.BytesIO(body))
    archive = read_archive(file, 50_000)
    tensors, _ = state_dict(archive)
    for key, ref in tensors.items():
        first, after = span_of(file, archive, key, ref)
        assert 0 <= first <= after <= len(body)


def _pickle(body: bytes) -> None:
    _archive(zipped(body))


def _weights(body: bytes) -> None:
    stored, _ = read_safetensors(io.BufferedReader(io.BytesIO(body)), len(body))
    for each in stored.values():
        first, after = each.span
        assert 0 <= first <= after <= len(body)
        assert each.tensor(bytearray(body[first:after])).shape == each.shape


def _form(body: bytes) -> None:
    parts = parts_of(body, f"multipart/form-data; boundary={seeds.BOUNDARY}")
    assert sum(len(part.content) for part in parts) <= len(body)
    assert all(part.label.isprintable() for part in parts)


def _arrays(body: bytes) -> None:
    """As latents, and what those are not as pictures."""
    try:
        _latents(body)
    except InvalidInput:
        _pixels(body)


TARGETS = {
    "npy": Target(_arrays, InvalidInput, seeds.npy),
    "npz": Target(_latents, InvalidInput, seeds.npz),
    "safetensors": Target(_arrays, InvalidInput, seeds.safetensors),
    "saved": Target(_latents, InvalidInput, seeds.archives),
    "png": Target(_pixels, InvalidInput, seeds.png),
    "jpeg": Target(_pixels, InvalidInput, seeds.jpeg),
    "webp": Target(_pixels, InvalidInput, seeds.webp),
    "avif": Target(_pixels, InvalidInput, seeds.avif),
    "form": Target(_form, InvalidInput, seeds.form),
    "pickle": Target(_pickle, UnsupportedCheckpoint, seeds.pickled),
    "archive": Target(_archive, UnsupportedCheckpoint, seeds.archives),
    "weights": Target(_weights, UnsupportedCheckpoint, seeds.weights),
}
