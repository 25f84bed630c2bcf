"""Tensors as bare bytes, little-endian in C order, whose shape and dtype are said elsewhere; FLUX's packing of latents.

Hugging Face's remote-VAE protocol sends them so. Packed latents are (N, patches, 4 C): one row for each 2x2 positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.wire.arrays.latents import LatentShape, finite_items
from app.wire.arrays.spec import CLIPS, LATENTS, ArraySpec, Purpose, Values, array_spec, check_size, values
from app.wire.scan import Body

CODES = {"float16": "<f2", "float32": "<f4", "bfloat16": "bf16", "uint8": "|u1"}

PATCH = 2
"""Positions of a packed patch along one side."""


@dataclass(frozen=True)
class Layout:
    """How latents lie in their bytes."""

    spec: ArraySpec
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches, where they are packed."""
    patched: bool = False
    """They are read with a patch's positions as channels, (N, 4 C, rows, columns), as FLUX.2's scaled ones are."""

    @property
    def shape(self) -> LatentShape:
        """As they are read."""
        if self.grid is None:
            return LatentShape((self.spec.shape,), self.spec.dtype, clip=self.spec.clip)
        (one, many, patches, channels), (rows, columns) = self.spec.shape, self.grid
        count = one * many * patches // (rows * columns)
        if self.patched:
            return LatentShape(((count, channels, rows, columns),), self.spec.dtype)
        return LatentShape(((count, channels // PATCH**2, rows * PATCH, columns * PATCH),), self.spec.dtype)


def bytes_spec(shape: Sequence[int], dtype: str, nbytes: int, purpose: Purpose) -> ArraySpec:
    """The array that `nbytes` bytes are said to be. Raises the purpose's error, and MalformedBody where they differ."""
    spec = array_spec(tuple(shape), CODES[dtype], 0, purpose=purpose)
    check_size(spec, nbytes)
    return spec


def latent_layout(
    shape: Sequence[int],
    dtype: str,
    nbytes: int,
    *,
    size: tuple[int, int] | None,
    channels: int,
    factor: int,
    patched: bool = False,
) -> Layout:
    """The layout of latents (N, C, h, w), (C, h, w), (N, C, 1, h, w), or of a clip (1, C, T, h, w).

    Or packed: (N, patches, 4 C), (patches, 4 C). `size` is the picture's (height, width) in pixels: without it nothing
    is packed. `channels` and `factor` are those of the model's raw latents. Raises InvalidLatent for other shapes, else
    as `bytes_spec`.
    """
    wide = PATCH**2 * channels
    if len(shape) in (2, 3) and shape[-1] == wide:
        grid = None if size is None else (size[0] // (PATCH * factor), size[1] // (PATCH * factor))
        if grid is not None and shape[-2] == grid[0] * grid[1]:
            return Layout(bytes_spec((1, *shape)[-3:], dtype, nbytes, LATENTS), grid, patched)
        if shape[0] != channels:
            said = (
                "height and width are not given" if size is None else f"{size[1]}x{size[0]} pixels have another number"
            )
            raise LATENTS.error(f"these look packed, {shape[-2]} patches of {wide}, but {said}")
    return Layout(bytes_spec(shape, dtype, nbytes, CLIPS))


def read_layout(layout: Layout, body: Body) -> list[Values]:
    """The latents, (C, h, w) each; raises InvalidLatent for values that are not finite."""
    array = values(layout.spec, body)
    if layout.grid is None:
        return finite_items([array])
    rows, columns = layout.grid
    patches = array.reshape(-1, rows, columns, array.shape[-1]).transpose(0, 3, 1, 2)
    if layout.patched:
        return finite_items([patches])
    apart = patches.reshape(len(patches), -1, PATCH, PATCH, rows, columns).transpose(0, 1, 4, 2, 5, 3)
    return finite_items([apart.reshape(len(patches), -1, rows * PATCH, columns * PATCH)])
