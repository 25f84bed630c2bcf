"""Where a pickle is read: its bytes, stack, marks and memo, within bounds.

No length is believed before the bytes are there, and steps are counted, so that time and memory are bounded too.
"""

from io import BufferedReader

from app.errors import UnsupportedCheckpoint
from app.weights.rebuilds import Global, StorageRef

LONGEST = 64 << 20  # bytes of one pickle; those of full checkpoints have less than one MiB
MOST_STEPS = 500_000  # opcodes and copied elements: a tensor takes about 25
LONGEST_NAME = 4096  # characters of a class or function
MOST_NAMES = 64 << 20  # characters of all of them: each is text of its own, be it made of the same two words


class Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, file: BufferedReader, length: int, most_steps: int = MOST_STEPS) -> None:
        self.file = file
        self.length = min(length, LONGEST)
        self.most_steps = most_steps
        self.position = 0
        self.steps = 0
        self.named = 0
        self.stack: list[object] = []
        self.marked: list[list[object]] = []  # the stacks below the open marks
        self.memo: dict[int, object] = {}
        self.storages: dict[str, StorageRef] = {}

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most_steps:
            raise UnsupportedCheckpoint(f"refused: the pickle has more than {self.most_steps} steps")

    def name(self, module: str, name: str) -> Global:
        """The name of a class or function."""
        length = len(module) + 1 + len(name)
        self.named += length
        if length > LONGEST_NAME or self.named > MOST_NAMES:
            raise UnsupportedCheckpoint(f"refused: the pickle names classes in {self.named} characters")
        return Global(f"{module}.{name}")

    def take(self, count: int) -> bytes:
        """The next bytes; asked for only once it is known that they are there."""
        left = self.length - self.position
        data = self.file.read(count) if count <= left else b""
        if len(data) < count:
            if self.length == LONGEST:
                raise UnsupportedCheckpoint(f"refused: the pickle has more than {LONGEST} bytes")
            raise UnsupportedCheckpoint(
                f"truncated: the pickle wants {count} bytes at byte {self.position}, {left} are left"
            )
        self.position += count
        return data

    def text(self, most: int) -> bytes:
        """The line of text that an opcode of protocol 0 has for an argument, without its end."""
        data = self.file.readline(min(most, self.length - self.position) + 1)
        self.position += len(data)
        if not data.endswith(b"\n") or self.position > self.length:
            raise UnsupportedCheckpoint(f"not a sound pickle, or truncated: an endless line at byte {self.position}")
        return data[:-1]

    def number(self, size: int) -> int:
        """The next unsigned integer, little-endian."""
        return int.from_bytes(self.take(size), "little")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def until_mark(self) -> list[object]:
        """What was pushed since the last mark, which is closed."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def remember(self, index: int) -> None:
        if not 0 <= index <= self.most_steps:
            raise UnsupportedCheckpoint(f"refused: the pickle wants place {index} of its memo")
        self.memo[index] = self.stack[-1]
