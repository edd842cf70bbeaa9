"""Documents kept on disk between reading and encoding."""

import struct
from collections.abc import Iterator
from pathlib import Path

_LENGTH = struct.Struct("<Q")


def pack(text: str) -> bytes:
    """A document as a `Spool`'s file holds it."""
    encoded = text.encode()
    return _LENGTH.pack(len(encoded)) + encoded


class Spool:
    """The documents of a file of `pack`ed ones, from the beginning or from a `position`.

    So a source is read once (C4 comes over the network), and the tokenizer is trained on the very
    text that is encoded.
    """

    def __init__(self, path: Path, position: int | None = None) -> None:
        self._path = path
        self._position = position or 0

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            file.seek(self._position)
            while header := file.read(_LENGTH.size):
                (length,) = _LENGTH.unpack(header)
                text = file.read(length).decode()
                self._position += _LENGTH.size + length
                yield text

    def position(self) -> int:
        """The byte after the document last given."""
        return self._position
