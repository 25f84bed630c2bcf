"""What is known of checkpoints in fp16: by the table of published files, and by what this process saw.

One item's evidence decides for everybody, so it must be the network's doing: an input that is finite in fp16, an output
that is not, and the same item finite in a wider precision. And it is never the last word: after RETRY batches in the
wider one the next batch tries fp16 again; where that is finite the verdict falls, where it is not the wait doubles.
"""

from collections import OrderedDict
from dataclasses import dataclass

from app.store.checkpoint import Checkpoint
from app.terms import Fp16

RETRY = 64
KNOWN = 4096  # verdicts that are remembered, the latest


@dataclass
class _Overflow:
    stands: bool
    wait: int  # batches from one try to the next
    left: int


class Verdicts:
    """Shared by all devices; lives on the event loop."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, _Overflow] = OrderedDict()

    def of(self, checkpoint: Checkpoint) -> Fp16:
        """ok, overflows or unknown."""
        seen = self._seen.get(checkpoint.sha256)
        return "overflows" if seen is not None and seen.stands else checkpoint.fp16

    def of_batch(self, checkpoint: Checkpoint) -> Fp16:
        """The same, for a batch that is about to run: it may be the one that tries again."""
        seen = self._seen.get(checkpoint.sha256)
        if seen is None or not seen.stands:
            return checkpoint.fp16
        seen.left -= 1
        return "overflows" if seen.left >= 0 else "unknown"

    def overflowed(self, checkpoint: Checkpoint) -> None:
        """Half precision gave NaN or Inf where a wider one did not."""
        before = self._seen.pop(checkpoint.sha256, None)
        wait = RETRY if before is None else 2 * before.wait
        self._seen[checkpoint.sha256] = _Overflow(True, wait, wait)
        if len(self._seen) > KNOWN:
            self._seen.popitem(last=False)

    def held(self, checkpoint: Checkpoint) -> None:
        """Half precision gave a finite output: a verdict falls, and the next one stands for longer."""
        if (seen := self._seen.get(checkpoint.sha256)) is not None:
            seen.stands = False

    def forget(self, checkpoint: Checkpoint) -> None:
        """What this process saw counts no more."""
        self._seen.pop(checkpoint.sha256, None)
