"""Knows which rows of a map are alive."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor


class Rows:
    """The rows of one map that are alive: written at the bottom, freed from the top."""

    def __init__(self) -> None:
        self.stop = 0  # rows written so far
        self._bands: deque[tuple[int, Tensor]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of what is alive."""
        return sum(band.nbytes for _, band in self._bands)

    def append(self, band: Tensor) -> None:
        """Writes a band below the others."""
        self._bands.append((self.stop, band))
        self.stop += band.shape[2]

    def read(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(row, view) of the bands that the rows start..stop lie in, clipped to these rows."""
        for top, band in self._bands:
            first, last = max(start, top), min(stop, top + band.shape[2])
            if first < last:
                yield first, band[:, :, first - top : last - top]

    def joined(self, start: int, stop: int) -> Tensor:
        """The rows start..stop: a view where they lie in one band."""
        parts = [part for _, part in self.read(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def free(self, row: int) -> None:
        """Lets go of the bands that lie above `row` as a whole."""
        while self._bands and self._bands[0][0] + self._bands[0][1].shape[2] <= row:
            self._bands.popleft()

    def trim(self, row: int) -> None:
        """`free`, and what is left of the top band becomes a small tensor of its own."""
        self.free(row)
        if self._bands and self._bands[0][0] < row:
            top, band = self._bands.popleft()
            self._bands.appendleft((row, band[:, :, row - top :].clone()))
