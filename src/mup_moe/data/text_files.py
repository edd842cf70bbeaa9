"""Reads the user's files as texts: plain text, JSON lines or Parquet, unpacked by gzip if the name ends in .gz.

`datasets` reads C4 from the hub but not these files: it fails on bytes that are not UTF-8, on half surrogates and on
empty files, drops names with brackets, and writes locks into the user's cache.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from mup_moe.config.document import in_one_line
from mup_moe.encoding import encoding_of, lenient
from mup_moe.files import UserError, refuse_pointer

PASSAGE_CHARACTERS = 4096
# A record is held in memory whole. A longer one is not a document but a gzip bomb or a file without JSON lines.
RECORD_CHARACTERS = 2**26
_PARQUET_RECORDS = 16  # held in memory at a time
_MAGIC = set("*?[")
_JSON = {".json", ".jsonl", ".ndjson"}
_FOREIGN = {".7z", ".bz2", ".tar", ".tgz", ".xz", ".zip", ".zst"}
# First bytes of files that are not text -> what the file is and what to do with it.
_SIGNATURES = {
    b"%PDF-": "is a PDF: convert it to text",
    b"{\\rtf1": "is RTF: convert it to text",
    b"PK\3\4": "is a ZIP archive, as are office documents: convert or unpack it to text",
    b"\x1f\x8b": "is compressed with gzip: end its name in .gz, and unpack it if it is compressed more than once",
    b"PAR1\x15": "is a Parquet file: end its name in .parquet",
    b"BZh91AY&SY": "is compressed with bzip2: unpack it, or compress it with gzip",
    b"\xfd7zXZ": "is compressed with xz: unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it, or compress it with gzip",
    b"\x04\x22\x4d\x18": "is compressed with LZ4: unpack it, or compress it with gzip",
}
# Whether a file is text is decided from this many bytes at its beginning, unpacked.
_SAMPLE_BYTES = 2**16
# Lone surrogates mark bytes that are not Unicode. Text may have the controls \a, \b, \t, line endings and escape.
_NOT_TEXT = re.compile("[\ud800-\udfff\0-\x06\x0e-\x1a\x1c-\x1f\x7f]")
# How much of a file may be such characters: Latin-1 with accents in a word or two. Other encodings have far more.
_STRAY_CHARACTERS, _STRAY_FRACTION = 3, 1 / 4
# Marks that turn the ASCII after them into other characters: escapes that terminals do not use, and HZ's braces.
_ISO_2022 = re.compile(rb"\x1b\$([@AB]|[()*+][@-I])")
_HZ = re.compile(rb"~\{([!-w][!-~])+~\}")


class Files:
    """The texts of files, in order, from the beginning or from a `position`.

    `read` yields the texts of one file; None is a record without text.
    """

    def __init__(
        self, paths: list[Path], read: Callable[[Path], Iterator[str | None]], position: list[int] | None = None
    ) -> None:
        self._paths = paths
        self._read = read
        self._file, self._record = position or (0, 0)

    def __iter__(self) -> Iterator[str | None]:
        while self._file < len(self._paths):
            for text in islice(self._read(self._paths[self._file]), self._record, None):
                self._record += 1
                yield text
            self._file, self._record = self._file + 1, 0

    def position(self) -> list[int]:
        """Returns the index of the last record's file and the number of records read from that file."""
        return [self._file, self._record]


def read_file(path: Path) -> Iterator[str | None]:
    """Yields the texts of one file, in the format that its name's ending says; None is a record without text.

    A plain file is cut into passages, each of which is a document. Raises UserError.
    """
    compressed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if compressed else path.name).suffix.lower()
    if suffix in _FOREIGN:
        raise _mistake(f"{path} is compressed in an unsupported format: unpack it, or compress it with gzip")
    if suffix == ".parquet" and compressed:
        raise _mistake(f"{path} is a Parquet file inside gzip: unpack it")
    if suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in _JSON:
        yield from _json_lines(path)
    else:
        with open_text(path) as file:
            yield from passages(file)


def find(patterns: tuple[str, ...]) -> list[Path]:
    """Returns the files that paths and globs name: in the patterns' order, with matches sorted by path, each once.

    Raises UserError for a pattern that matches no file.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def passages(file: TextIO) -> Iterator[str]:
    """Cuts a text into passages; joined together, they are the text again.

    A passage ends with the first blank line after PASSAGE_CHARACTERS or, if there is none, at four times
    that length.
    """
    passage: list[str] = []
    length = 0
    # Limiting the line length bounds the memory if a file is one huge line.
    while line := file.readline(PASSAGE_CHARACTERS):
        passage.append(line)
        length += len(line)
        if length >= (4 * PASSAGE_CHARACTERS if line.strip() else PASSAGE_CHARACTERS):
            yield "".join(passage)
            passage, length = [], 0
    if passage:
        yield "".join(passage)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text file in UTF-8 or by its byte order mark, unpacked if its name ends in .gz.

    All line endings become newlines. Bytes that are not Unicode become lone surrogates, which `read_batches` replaces
    and counts. Raises UserError for a file whose beginning is not text and, possibly from within the block, for one
    that cannot be read to its end.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        refuse_pointer(path)
        with opener(path, "rb") as packed:
            beginning = packed.read(_SAMPLE_BYTES)
            encoding = encoding_of(beginning)
            content = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
            for signature, reason in _SIGNATURES.items():
                if content.startswith(signature):
                    raise _mistake(f"{path} {reason}, or leave it out")
            _check_text(beginning, encoding, path)
            packed.seek(0)
            with io.TextIOWrapper(packed, encoding, lenient(encoding)) as file:
                yield file
    except gzip.BadGzipFile as error:
        raise _unreadable(path, error, "remove .gz from its name if it is plain, download it again") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _check_text(beginning: bytes, encoding: str, path: Path) -> None:
    """Raises UserError if a file does not begin like text in this encoding."""
    if beginning.isascii():
        foreign = "ISO-2022" if _ISO_2022.search(beginning) else "HZ" if _is_hz(beginning) else None
        if foreign is not None:
            raise _mistake(f"{path} is in {foreign}: convert it to UTF-8, or leave it out")
    # Decoded incrementally, because the sample may end within a character.
    text = codecs.getincrementaldecoder(encoding)(lenient(encoding)).decode(beginning)
    odd = sum(1 for _ in _NOT_TEXT.finditer(text))
    if "\0" in text or odd > max(_STRAY_CHARACTERS, _STRAY_FRACTION * len(text)):
        raise _mistake(
            f"{path} is not text, or not in UTF-8 (of its first {len(text):,} characters {odd:,} are control characters"
            " or cannot be decoded): convert it to UTF-8, or leave it out"
        )


def _is_hz(beginning: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("hz")().decode(beginning)
    except UnicodeDecodeError:
        return False
    return _HZ.search(beginning) is not None


def _unreadable(path: Path, error: Exception, remedy: str = "download it again") -> UserError:
    return _mistake(f"{path} cannot be read ({' '.join(str(error).split())}): {remedy}, or leave it out")


def _matches(pattern: str) -> list[Path]:
    try:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise _mistake(
                f"`files` lists the folder {pattern}: use a glob for its files, such as {pattern.rstrip('/')}/**/*.txt"
            )
        if path.is_file():
            return [path]
        fixed = next((i for i, part in enumerate(path.parts) if _MAGIC.intersection(part)), None)
        if fixed is None:
            raise _mistake(f"`files` lists {pattern}, which is not a file: correct the path")
        base, glob = Path(*path.parts[:fixed]), path.parts[fixed:]
        # pathlib's `**`, unlike that of `glob`, does not follow links to folders, so loops end.
        matches = [match for match in base.glob("/".join(glob)) if match.is_file()]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _mistake(f"`files` lists {pattern!r}, which is neither a path nor a glob ({error}): correct it") from None
    if not any(part.startswith(".") for part in glob):
        # As in a shell, only a pattern with a leading dot matches hidden files.
        matches = [m for m in matches if not any(part.startswith(".") for part in m.relative_to(base).parts)]
    if not matches:
        raise _mistake(f"`files` lists the glob {pattern}, which matches no file: correct or remove it")
    return sorted(matches, key=Path.as_posix)


def _json_lines(path: Path) -> Iterator[str | None]:
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(RECORD_CHARACTERS + 1), ""), start=1):
            if len(line) > RECORD_CHARACTERS:
                raise _too_long(f"{path}, line {number},")
            line = line.lstrip("\ufeff")  # from concatenated files with byte order marks
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise _mistake(
                    f"{path}, line {number}, is not a JSON object: give one object with the field `text` per line"
                )
            text = record.get("text")
            yield text if isinstance(text, str) else None


def _parquet(path: Path) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        refuse_pointer(path)
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise _mistake(f"{path} has no column `text`: rename the column of the documents to `text`")
            kind = file.schema_arrow.types[file.schema_arrow.names.index("text")]
            try:
                pa.nulls(0, kind).cast(pa.large_binary())
            except pa.ArrowNotImplementedError:
                raise _mistake(f"{path} has a column `text` of type {kind}: give one of type string") from None
            for group in map(file.metadata.row_group, range(file.num_row_groups)):
                # The unpacked size. Do not query the size of one column, since Arrow aborts if that is damaged.
                if group.total_byte_size > 4 * RECORD_CHARACTERS * max(group.num_rows, 1):
                    raise _too_long(f"{path} has a record that")
            for number, batch in enumerate(file.iter_batches(batch_size=_PARQUET_RECORDS, columns=["text"])):
                # Read as bytes, because Arrow's text may not be valid UTF-8.
                values = batch.column(0).cast(pa.large_binary()).to_pylist()
                if number == 0 and "binary" in str(kind):
                    _check_text(b"".join(filter(None, values))[:_SAMPLE_BYTES], "utf-8", path)
                for value in values:
                    yield None if value is None else value.decode("utf-8", "surrogateescape")
    # A damaged column name raises ValueError.
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _mistake(sentence: str) -> UserError:
    """Returns an error with a one-line message, whatever names and libraries put into it."""
    return UserError(in_one_line(sentence))


def _too_long(record: str) -> UserError:
    return _mistake(f"{record} is longer than {RECORD_CHARACTERS:,} characters: split it, or provide it as plain text")
