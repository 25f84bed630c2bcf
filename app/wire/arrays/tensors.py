"""Latents as safetensors files. Every offset is checked before use."""

import numpy as np

from app.errors import InvalidLatent, MalformedBody
from app.weights.header import PREFIX, Entry, Header, format_header, header_length, parse_header
from app.wire.arrays.spec import LATENTS, ArraySpec, Purpose, Values, array_spec, check_size
from app.wire.scan import Body

MAX_HEADER = 1 << 20
"""Bytes; ComfyUI puts a whole workflow in there."""

_NAMES = ("latents", "latent_tensor", "latent")
_COMFYUI = "latent_tensor"
_COMFYUI_RAW = "latent_format_version_0"
"""An empty tensor that says of ComfyUI's latents that they are raw. Without it they are from before ComfyUI knew more
than one latent space: as Stable Diffusion 1 sees them; it divides them by that scaling factor when it loads them."""
_COMFYUI_OLD = {"convention": "scaled", "family": "sd1"}
_CODES = {"F16": "<f2", "F32": "<f4", "BF16": "bf16", "F64": "<f8", "U8": "|u1"}
_DTYPES = {"float16": "F16", "float32": "F32"}


def safetensors_header(body: Body, purpose: Purpose = LATENTS) -> tuple[ArraySpec, dict[str, str]]:
    """What a safetensors file declares of its only tensor, or of the one that is named as latents are; its metadata.

    Raises MalformedBody where the header, its offsets and the body's length disagree, and the purpose's error where no
    tensor is meant, or where it has a dtype or shape that the purpose doesn't have.
    """
    start = PREFIX + header_length(bytes(body[:PREFIX]))
    if start > min(len(body), PREFIX + MAX_HEADER):
        raise MalformedBody(f"the safetensors header is truncated, or longer than {MAX_HEADER} bytes")
    try:
        header = parse_header(bytes(body[PREFIX:start]))
    except ValueError as error:
        raise MalformedBody(f"not a safetensors file: {error}") from error
    name = _meant(list(header.entries), purpose)
    latents = header.entries[name]
    if header.data_bytes != len(body) - start:
        there = len(body) - start
        raise MalformedBody(f"the safetensors header declares {header.data_bytes} bytes of data, {there} are there")
    spec = array_spec(latents.shape, _CODES.get(latents.dtype, latents.dtype), start + latents.begin, purpose=purpose)
    check_size(spec, start + latents.end)
    said = {"convention": "raw"} if _COMFYUI_RAW in header.entries else _COMFYUI_OLD if name == _COMFYUI else {}
    return spec, said | dict(header.metadata)


def write_safetensors(array: Values, metadata: dict[str, str]) -> bytes:
    """A safetensors file of one tensor `latents`, float16 or float32, and what is known of it.

    (N, C, h, w), or of clips (N, C, T, h, w).
    """
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    entry = Entry(_DTYPES[array.dtype.name], data.shape, 0, data.nbytes)
    return b"".join((format_header(Header({_NAMES[0]: entry}, metadata)), data.data))


def _meant(names: list[str], purpose: Purpose) -> str:
    named = _NAMES if purpose.error is InvalidLatent else ()
    for name in names if len(names) == 1 else named:
        if name in names:
            return name
    hint = f", or one named {' or '.join(named)}" if named else ""
    raise purpose.error(f"expected one tensor{hint}, got {', '.join(names)[:80] or 'none'}")
