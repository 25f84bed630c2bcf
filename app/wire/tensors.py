"""The safetensors layout: the header's length, a JSON header, the data. Every offset is checked before use."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.errors import InvalidLatent, MalformedBody
from app.wire.declared import Declared, Values, check_size, declare
from app.wire.scan import Body

MAX_HEADER = 1 << 20
"""Bytes; ComfyUI puts a whole workflow in there."""

_NAMES = ("latents", "latent_tensor", "latent")
_COMFYUI_RAW = "latent_format_version_0"  # an empty tensor of this name: ComfyUI's latents without a scaling factor
_CODES = {"F16": "<f2", "F32": "<f4", "BF16": "bf16", "F64": "<f8"}
_DTYPES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def safetensors_header(body: Body) -> tuple[Declared, dict[str, str]]:
    """What a safetensors file declares of its only tensor, or of the one that is named as latents are; its metadata.

    Raises MalformedBody where the header, its offsets and the body's length disagree, and InvalidLatent where no
    tensor is the latents, or where they have a dtype or shape that latents don't have.
    """
    start = 8 + int.from_bytes(body[:8], "little")
    header = _json(body, start)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedBody("the safetensors metadata is not a map of strings")
    latents = _latents(list(header))
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    _check_offsets(list(tensors.values()), len(body) - start)
    tensor = tensors[latents]
    declared = declare(tensor.shape, _CODES.get(tensor.dtype, tensor.dtype), start + tensor.begin)
    check_size(declared, start + tensor.end)
    return declared, {"convention": "raw"} | metadata if _COMFYUI_RAW in tensors else metadata


def write_safetensors(array: Values, metadata: dict[str, str]) -> bytes:
    """A safetensors file of one tensor `latents`, float16 or float32 (N, C, h, w), and what is known of it."""
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    tensor = {"dtype": _DTYPES[array.dtype.name], "shape": data.shape, "data_offsets": (0, data.nbytes)}
    header = json.dumps({"__metadata__": metadata, _NAMES[0]: tensor}).encode()
    header += b" " * (-len(header) % 8)  # so that the data is aligned in a mapped file
    return b"".join((len(header).to_bytes(8, "little"), header, data.data))


def _json(body: Body, end: int) -> dict[str, Any]:
    if end > min(len(body), 8 + MAX_HEADER):
        raise MalformedBody(f"the safetensors header is truncated, or longer than {MAX_HEADER} bytes")
    try:
        header = json.loads(bytes(body[8:end]))
    except (ValueError, RecursionError) as error:
        raise MalformedBody("the safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise MalformedBody("the safetensors header is not a JSON object")
    return header


def _tensor(name: str, entry: object) -> _Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if all(type(side) is int and side >= 0 for side in shape):
                return _Tensor(dtype, tuple(shape), begin, end)
    raise MalformedBody(f"the safetensors header has no dtype, shape and data_offsets for {name[:40]!r}")


def _check_offsets(tensors: list[_Tensor], size: int) -> None:
    """The tensors must tile the data without gap or overlap, as the format demands."""
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at or tensor.end < at:
            raise MalformedBody("the safetensors offsets overlap or leave a gap")
        at = tensor.end
    if at != size:
        raise MalformedBody(f"the safetensors header declares {at} bytes of data, {size} are there")


def _latents(names: list[str]) -> str:
    for name in names if len(names) == 1 else _NAMES:
        if name in names:
            return name
    raise InvalidLatent(
        f"expected one tensor, or one named {' or '.join(_NAMES)}, got {', '.join(names)[:80] or 'none'}"
    )
