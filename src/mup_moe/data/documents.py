"""The documents of a corpus: a stream of texts that is the same in every run."""

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

from mup_moe.config.settings import CorpusSettings
from mup_moe.data import c4, python_source, text_files
from mup_moe.data.corpus import SPLITS
from mup_moe.data.work import Spool
from mup_moe.encoding import NO_TEXT

# Later stages hold few documents at a time, so these limits bound their memory.
MAX_CHARACTERS = 2**20
BATCH_CHARACTERS = 2**20


# A fixed sequence of texts, with None for a record without text; it can resume after any record, by its `position`.
Source: TypeAlias = c4.Stream | text_files.Files | Spool


@dataclass
class Tally:
    """What reading left out or changed, in records."""

    empty: int = 0  # skipped: only white space
    without_text: int = 0  # skipped: `text` is missing or not a string
    repaired: int = 0  # kept, with U+FFFD in place of NUL and invalid Unicode
    cut: int = 0  # kept as several documents: longer than MAX_CHARACTERS


@dataclass
class Count:
    """How much of a split was read, with bytes in UTF-8."""

    documents: int = 0
    bytes: int = 0


@dataclass
class Place:
    """How far a source was read, and what was found so far."""

    position: Any = None  # in the source's own format; None at the beginning
    finished: bool = False
    records: int = 0  # read so far, including those without text
    tally: Tally = field(default_factory=Tally)
    counts: dict[str, Count] = field(default_factory=lambda: {split: Count() for split in SPLITS})

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Returns the place with this `dataclasses.asdict`; the beginning for None."""
        if value is None:
            return cls()
        counts = {split: Count(**count) for split, count in value["counts"].items()}
        return cls(**value | {"tally": Tally(**value["tally"]), "counts": counts})

    @property
    def documents(self) -> int:
        """The number of documents of both splits."""
        return sum(count.documents for count in self.counts.values())

    @property
    def bytes(self) -> int:
        """The number of UTF-8 bytes of both splits."""
        return sum(count.bytes for count in self.counts.values())


class Document(NamedTuple):
    """A text that is not blank and can be encoded, with its `text_digest` and split."""

    text: str
    digest: bytes
    split: str


class Batch(NamedTuple):
    """Consecutive documents and the place after them; None in the middle of a record."""

    documents: list[Document]
    after: Place | None


def open_source(settings: CorpusSettings, position: Any) -> Source:
    """Opens the records of a corpus from a position, or from the beginning for None. Raises UserError."""
    if settings.source == "c4" and not settings.files:
        return c4.Stream(position)
    reader = python_source.read_file if settings.source == "python" else text_files.read_file
    return text_files.Files(source_files(settings), reader, position)


def source_files(settings: CorpusSettings) -> list[Path]:
    """Returns the files that a corpus is read from, in reading order; none for the hub. Raises UserError."""
    return python_source.find(settings.packages) if settings.source == "python" else text_files.find(settings.files)


def read_batches(
    source: Source, place: Place, validation_fraction: float, max_bytes: int | None = None
) -> Iterator[Batch]:
    """Yields the documents of a source that begins at `place`, about BATCH_CHARACTERS at a time.

    Ends with the document that reaches `max_bytes` of UTF-8, counted from the source's beginning. A
    document longer than MAX_CHARACTERS becomes several, perhaps in several batches. Only the last batch
    has a finished place after it; this batch may have no documents. From a finished place, there are no
    batches.

    Raises UserError if the source cannot be read.
    """
    if place.finished:
        return
    place = deepcopy(place)
    batch: list[Document] = []
    room = BATCH_CHARACTERS
    for raw in source:
        place.records += 1
        if raw is None:
            place.tally.without_text += 1
            continue
        for document in _documents(raw, place.tally, validation_fraction):
            batch.append(document)
            room -= len(document.text) + 100  # each encoding has an overhead, and documents may be tiny
            count = place.counts[document.split]
            count.documents += 1
            count.bytes += len(document.text.encode())
            if max_bytes is not None and place.bytes >= max_bytes:
                place.finished = True
                yield Batch(batch, place)
                return
            if room <= -MAX_CHARACTERS:
                yield Batch(batch, None)
                batch, room = [], BATCH_CHARACTERS
        if room <= 0:
            place.position = source.position()
            yield Batch(batch, deepcopy(place))
            batch, room = [], BATCH_CHARACTERS
    place.finished = True
    yield Batch(batch, place)


def _documents(raw: str, tally: Tally, validation_fraction: float) -> Iterator[Document]:
    if not raw.strip():
        tally.empty += 1
        return
    tally.cut += len(raw) > MAX_CHARACTERS
    whole = NO_TEXT.sub("\ufffd", raw)
    tally.repaired += whole != raw
    for start in range(0, len(whole), MAX_CHARACTERS):
        text = whole[start : start + MAX_CHARACTERS]
        if text.strip():
            digest = text_digest(text)
            yield Document(text, digest, "valid" if in_validation(digest, validation_fraction) else "train")


def text_digest(text: str) -> bytes:
    """Returns the SHA-256 of a document's UTF-8 bytes, as 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


def in_validation(digest: bytes, fraction: float) -> bool:
    """Returns whether the document with this digest is held out; true for about `fraction` of all digests.

    Equal texts are always in the same split, wherever and however often they occur.
    """
    return _unit(digest[:8]) < fraction


def in_sample(digest: bytes, fraction: float) -> bool:
    """Returns whether a document is in a sample of about `fraction`, independently of `in_validation`."""
    return _unit(digest[8:16]) < fraction


def _unit(eight_bytes: bytes) -> float:
    return int.from_bytes(eight_bytes) / 2**64
