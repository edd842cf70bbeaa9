"""Documents kept on disk between reading and encoding."""

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from mup_moe.data.split import text_digest
from mup_moe.files import UserError

_LENGTH = struct.Struct("<Q")


class Spool:
    """Documents in an unnamed file: added once, read any number of times, gone with the process.

    So a source is read only once (C4 comes over the network), and the tokenizer is trained on the
    very text that is encoded.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self.documents = 0
        self.bytes = 0
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)
