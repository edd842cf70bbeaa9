"""Text files as other programs save them: UTF-8, or by the byte order mark that they begin with.

Without heavy imports, so that a Snakefile can import it.
"""

import codecs
import re
from pathlib import Path

from mup_moe.files import refuse_pointer

# What no text holds: half a surrogate pair is not Unicode, and NUL is the rest of a binary or UTF-16 passage.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
# UTF-32's first, for UTF-16's mark is the beginning of one of them.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# As Python's surrogateescape, which UTF-16 and UTF-32 cannot use: what is not Unicode becomes a lone surrogate.
_LONE_SURROGATE = "mup-moe.lone-surrogate"
codecs.register_error(_LONE_SURROGATE, lambda error: ("\udcff", getattr(error, "end")))  # noqa: B009 - any UnicodeError


def encoding_of(beginning: bytes) -> str:
    """The encoding that a file's byte order mark names; UTF-8 where there is none."""
    return next((encoding for mark, encoding in _MARKS.items() if beginning.startswith(mark)), "utf-8")


def lenient(encoding: str) -> str:
    """The error handler by which bytes that are not Unicode become lone surrogates."""
    return "surrogateescape" if encoding.startswith("utf-8") else _LONE_SURROGATE


def read_text(path: Path) -> str:
    """A whole text file; all line ends become newlines.

    Raises OSError, ValueError where it is not text, and UserError for a Git LFS pointer.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    text = path.read_text(encoding=encoding)
    if "\0" in text:
        raise ValueError("it holds NUL, so it is not text in UTF-8")
    return text
