"""Documents kept on disk between reading and encoding."""

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from mup_moe.files import UserError

_LENGTH = struct.Struct("<Q")


class Spool:
    """Documents in an unnamed file: added once, read any number of times, gone with the process.

    So a source is read once (C4 comes over the network), and the tokenizer is trained on the very
    text that is encoded. Raises UserError when the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self.documents = 0
        self.bytes = 0
        with self._disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # __exit__ closes it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, text: str, digest: bytes) -> None:
        """Appends a document, given with its `text_digest`."""
        encoded = text.encode()
        with self._disk_errors():
            self._file.write(_LENGTH.pack(len(encoded)) + encoded)
        self._digest.update(digest)
        self.documents += 1
        self.bytes += len(encoded)

    def __iter__(self) -> Iterator[str]:
        with self._disk_errors():
            self._file.seek(0)  # writes out what is buffered
        while header := self._file.read(_LENGTH.size):
            yield self._file.read(*_LENGTH.unpack(header)).decode()

    @property
    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of the documents' digests in their order."""
        return self._digest.hexdigest()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"text cannot be kept in {self._folder} ({error.strerror}): free space or permit writing there,"
                " and run the same command again"
            ) from error
