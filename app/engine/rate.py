"""How long batches take on one device, learned from those that ran: a fixed cost, and a slope over their pixels."""

from collections import OrderedDict
from collections.abc import Iterable

from app.engine.jobs import Job
from app.terms import Op

KNOWN = 1024  # (model, operation) pairs that are remembered, those used last

EVEN = 0.02
"""Megapixels whose slope is taken to cost as much as a batch by itself, until batches of two sizes tell them apart."""

DECAY = 0.8  # of the weight of what was measured before, with each batch
FIRST = 0.1  # weight of a model's first batch, in which libraries set themselves up
RIDGE = 1e-3  # beside weights of about 1: what one size leaves open is shared out by EVEN


class Line:
    """seconds = fixed + slope * megapixels, by least squares of relative errors; old batches fade."""

    def __init__(self) -> None:
        self.batches = 0
        self._sums = [0.0] * 5  # of weighted products: a a, a b, b b, a y, b y

    def note(self, megapixels: float, seconds: float) -> None:
        """Takes in a batch."""
        scale = EVEN + megapixels
        a, b, y = EVEN / scale, megapixels / scale, seconds / scale
        weight = 1.0 if self.batches else FIRST
        new = (a * a, a * b, b * b, a * y, b * y)
        self._sums = [DECAY * old + weight * each for old, each in zip(self._sums, new, strict=True)]
        self.batches += 1

    def seconds(self, megapixels: float, batches: int = 1) -> float:
        """Expected for so many pixels in so many batches."""
        aa, ab, bb, ay, by = self._sums
        aa, bb = aa + RIDGE, bb + RIDGE
        determinant = aa * bb - ab * ab
        fixed, slope = (ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant
        if fixed < 0:
            fixed, slope = 0.0, by / bb
        elif slope < 0:
            fixed, slope = ay / aa, 0.0
        return batches * EVEN * fixed + slope * megapixels


class Rate:
    """A `Line` for each model and operation, and one over all for those that have not run yet."""

    def __init__(self) -> None:
        self._lines: OrderedDict[tuple[str, Op], Line] = OrderedDict()
        self._all = Line()

    def note(self, network: str, op: Op, pixels: int, seconds: float) -> None:
        """Takes in one finished batch."""
        line = self._lines.setdefault((network, op), Line())
        self._lines.move_to_end((network, op))
        for each in (line, self._all):
            each.note(pixels / 1e6, seconds)
        if len(self._lines) > KNOWN:
            self._lines.popitem(last=False)

    def knows(self, network: str, op: Op) -> bool:
        """Whether the model itself has run."""
        return (network, op) in self._lines

    def seconds(self, network: str, op: Op, pixels: int, batches: int = 1) -> float:
        """Expected seconds of so many pixels in so many batches; 0 before anything was measured."""
        return self._lines.get((network, op), self._all).seconds(pixels / 1e6, batches)

    def of(self, jobs: Iterable[Job], batch_pixels: int) -> float:
        """Expected seconds of these jobs, in batches of so many pixels."""
        pixels: dict[tuple[str, Op], int] = {}
        for job in jobs:
            key = (job.task.network, job.task.op)
            pixels[key] = pixels.get(key, 0) + job.pixels
        return sum(self.seconds(*key, total, -(-total // batch_pixels)) for key, total in pixels.items())
