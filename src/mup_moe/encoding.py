"""Reads text files as other programs save them: in UTF-8, or in the encoding that a byte order mark names.

Has no heavy imports, so that a Snakefile can import it.
"""

import codecs
import re
from pathlib import Path

from mup_moe.files import refuse_pointer

# Characters that valid text never has: half a surrogate pair is not Unicode, and NUL comes from binary data or UTF-16.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
# UTF-32 first, because one of its marks begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# Like Python's surrogateescape, which UTF-16 and UTF-32 cannot use: invalid input becomes a lone surrogate.
_LONE_SURROGATE = "mup-moe.lone-surrogate"
codecs.register_error(_LONE_SURROGATE, lambda error: ("\udcff", getattr(error, "end")))  # noqa: B009 - any UnicodeError


def encoding_of(beginning: bytes) -> str:
    """Returns the encoding that a file's byte order mark names; UTF-8 if it has none."""
    return next((encoding for mark, encoding in _MARKS.items() if beginning.startswith(mark)), "utf-8")


def lenient(encoding: str) -> str:
    """Returns the error handler that turns bytes that are not Unicode into lone surrogates."""
    return "surrogateescape" if encoding.startswith("utf-8") else _LONE_SURROGATE


def read_text(path: Path) -> str:
    """Reads a whole text file and converts all line endings to newlines.

    Raises OSError, ValueError if the file is not text, and UserError for a Git LFS pointer.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    text = path.read_text(encoding=encoding)
    if "\0" in text:
        raise ValueError("it contains NUL, so it is not UTF-8 text")
    return text
