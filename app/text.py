"""Text from files, requests and errors as it may be shown: in one line, in any encoding, not endless."""

from pathlib import Path


def one_line(text: str) -> str:
    """The text with escapes for line breaks, other controls, and the halves of surrogate pairs that UTF-8 lacks.

    Names in files and in requests may hold all of these.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(path: Path | str) -> str:
    """A name or path as text that any encoding can carry: bytes that are not UTF-8 become escapes."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def short(name: str) -> str:
    """A name from a file as it may stand in an error: one line, not endless."""
    return ascii(name[:200])[1:-1][:100]


def reason(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
