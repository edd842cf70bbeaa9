"""The documents of a corpus: a stream of texts, the same one in every run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mup_moe.config.settings import CorpusSettings
from mup_moe.data import c4, python_source, text_files

# What follows handles one document at a time, so this bounds its memory.
MAX_CHARACTERS = 2**20
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass
class Tally:
    """What reading left out or changed, in documents."""

    empty: int = 0
    """Skipped: nothing but white space."""
    without_text: int = 0
    """Skipped: records whose `text` is absent or no string."""
    repaired: int = 0
    """Kept, with U+FFFD in place of what was not Unicode."""


def read_documents(settings: CorpusSettings, tally: Tally) -> Iterator[str]:
    """The texts of a corpus in its order, none blank and all encodable as UTF-8.

    Ends with the document that reaches `max_bytes` of UTF-8. A document longer than
    MAX_CHARACTERS comes as several. `tally` counts up to the document last taken.

    Raises UserError when the source cannot be read.
    """
    total = 0
    for raw in _source(settings):
        if raw is None:
            tally.without_text += 1
            continue
        for start in range(0, max(len(raw), 1), MAX_CHARACTERS):
            piece = raw[start : start + MAX_CHARACTERS]
            if not piece.strip():
                tally.empty += 1
                continue
            text = _SURROGATES.sub("\ufffd", piece)
            tally.repaired += text != piece
            total += len(text.encode())
            yield text
            if settings.max_bytes is not None and total >= settings.max_bytes:
                return


def _source(settings: CorpusSettings) -> Iterator[str | None]:
    """The texts as the source gives them; None is a record without text."""
    match settings.source:
        case "python":
            return python_source.read(settings.packages)
        case "text":
            return text_files.read(settings.files)
        case "c4":
            return text_files.read(settings.files) if settings.files else c4.read()
