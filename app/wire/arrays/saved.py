"""Latents that torch.save wrote: a tensor, a list of tensors, or a dict where one of them is told by its name.

`weights` reads the pickle, and runs nothing of it; here it is said which of its tensors are latents.
"""

import io
from collections.abc import Sequence

from app.errors import InvalidLatent, MalformedBody, TooLarge, UnsupportedCheckpoint
from app.weights.archives import Archive, read_archive, span_of
from app.weights.rebuilds import TensorRef, kind
from app.wire.arrays.spec import ArraySpec, Values, array_spec, values
from app.wire.scan import Body

MAX_TENSORS = 1024
MAX_STEPS = 50_000
"""Of each pickle; a tensor takes about 25. Checkpoints may have more, and nobody waits for them."""

_NAMES = ("latents", "latent", "samples", "x")
_CODES = {"torch.float16": "<f2", "torch.float32": "<f4", "torch.bfloat16": "bf16", "torch.float64": "<f8"}


def saved_headers(body: Body) -> list[ArraySpec]:
    """What a file of torch.save declares of its latents, in order, and where in the body they are.

    Raises MalformedBody for a file that is not sound or asks to call something, TooLarge above `MAX_TENSORS`, and
    InvalidLatent where no tensor is the latents, or where they have a dtype or shape that latents don't have.
    """
    file: io.BufferedReader = io.BufferedReader(io.BytesIO(body))
    try:
        archive = read_archive(file, MAX_STEPS)
        return [_spec(file, archive, ref) for ref in _latents(archive.content)]
    except UnsupportedCheckpoint as error:
        raise MalformedBody(f"the file of torch.save: {error}") from error


def read_saved(body: Body, max_bytes: int) -> list[Values]:
    """The latents (N, C, h, w) of a file of torch.save.

    Raises TooLarge where they are more than `max_bytes`, as tensors that share a storage may be; else as
    `saved_headers`.
    """
    specs = saved_headers(body)
    total = sum(spec.nbytes for spec in specs)
    if total > max_bytes:
        raise TooLarge(f"the tensors of the file are {total} bytes, more than the limit of {max_bytes}")
    return [values(spec, body) for spec in specs]


def _latents(content: object) -> Sequence[TensorRef]:
    found = _named(content) if isinstance(content, dict) else content
    refs = [found] if isinstance(found, TensorRef) else found
    if not isinstance(refs, list | tuple) or not refs or not all(isinstance(ref, TensorRef) for ref in refs):
        raise InvalidLatent(
            f"expected a tensor, a list of tensors, or a dict with one tensor or one named {' or '.join(_NAMES)}, "
            f"got {kind(content)[:80]}"
        )
    if len(refs) > MAX_TENSORS:
        raise TooLarge(f"the file holds {len(refs)} tensors, more than {MAX_TENSORS}")
    return refs


def _named(content: dict[str, object]) -> object:
    """What goes by a name of latents; else the only tensor."""
    for name in _NAMES:
        if isinstance(content.get(name), TensorRef | list | tuple):
            return content[name]
    tensors = [value for value in content.values() if isinstance(value, TensorRef)]
    return tensors[0] if len(tensors) == 1 else None


def _spec(file: io.BufferedReader, archive: Archive, ref: TensorRef) -> ArraySpec:
    code = _CODES.get(ref.dtype, ref.dtype.removeprefix("torch."))
    array_spec(ref.shape, code, 0)  # whether it can be latents, before where it is
    start, _ = span_of(file, archive, "the latents", ref)
    return array_spec(ref.shape, code, start, strides=ref.stride)
