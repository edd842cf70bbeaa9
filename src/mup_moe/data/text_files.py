"""The user's files as texts: plain text, JSON lines, Parquet; gzip where the name ends in .gz.

`datasets` reads C4 from the hub but not these: it stops at bytes that are not UTF-8, at half
surrogates and at empty files, drops names with brackets, and writes locks into the user's cache.
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
# A record is held whole, and what is more than this is no document: a bomb of gzip's, or no lines of JSON.
RECORD_CHARACTERS = 2**26
_PARQUET_RECORDS = 16  # held at a time
_MAGIC = set("*?[")
_JSON = {".json", ".jsonl", ".ndjson"}
_FOREIGN = {".7z", ".bz2", ".tar", ".tgz", ".xz", ".zip", ".zst"}
# What a file begins with that is not text, and what it is and how it is read instead.
_SIGNATURES = {
    b"%PDF-": "is a PDF: convert it to text",
    b"{\\rtf1": "is RTF: convert it to text",
    b"PK\3\4": "is a ZIP archive, as office documents are: convert or unpack it to text",
    b"\x1f\x8b": "is compressed by gzip: let its name end in .gz, once for each time it is compressed",
    b"PAR1\x15": "is a Parquet file: let its name end in .parquet",
    b"BZh91AY&SY": "is compressed by bzip2: unpack it, or compress it with gzip",
    b"\xfd7zXZ": "is compressed by xz: unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it, or compress it with gzip",
    b"\x04\x22\x4d\x18": "is compressed by LZ4: unpack it, or compress it with gzip",
}
# By this much of its beginning, unpacked, a file is text or is not.
_SAMPLE_BYTES = 2**16
# Lone surrogates are bytes that are not Unicode. Controls that text has: \a, \b, \t, line ends, and escape.
_NOT_TEXT = re.compile("[\ud800-\udfff\0-\x06\x0e-\x1a\x1c-\x1f\x7f]")
# So much of it may be: Latin-1 in which a word or two has accents. Any other encoding has far more.
_STRAY_CHARACTERS, _STRAY_FRACTION = 3, 1 / 4
# What turns the ASCII after it into other characters: escapes that terminals do not use, and the braces of HZ.
_ISO_2022 = re.compile(rb"\x1b\$([@AB]|[()*+][@-I])")
_HZ = re.compile(rb"~\{([!-w][!-~])+~\}")


class Files:
    """The texts of files, one file after the other, from the beginning or from a `position`.

    `read` gives the texts of one file; None is a record without text.
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
        """The file of the record last given, and how many of its records were given, both from 0."""
        return [self._file, self._record]


def read_file(path: Path) -> Iterator[str | None]:
    """The texts of one file, by the ending of its name; None is a record without text.

    A plain file is cut into passages, each of which is a document. Raises UserError.
    """
    compressed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if compressed else path.name).suffix.lower()
    if suffix in _FOREIGN:
        raise _mistake(f"{path} is compressed in a way that is not read here: unpack it, or compress it with gzip")
    if suffix == ".parquet" and compressed:
        raise _mistake(f"{path} is a Parquet file within gzip: unpack it")
    if suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in _JSON:
        yield from _json_lines(path)
    else:
        with open_text(path) as file:
            yield from passages(file)


def find(patterns: tuple[str, ...]) -> list[Path]:
    """The files that paths and globs name: in the patterns' order, matches sorted by path, none twice.

    Raises UserError for a pattern that names none.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def passages(file: TextIO) -> Iterator[str]:
    """Cuts a text into passages, which joined together are the text again.

    A passage ends with the first blank line after PASSAGE_CHARACTERS, or, where there is none, at
    four times that.
    """
    passage: list[str] = []
    length = 0
    # The bound on a line holds memory where a file is one huge line.
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
    """Opens text, unpacked if its name ends in .gz: UTF-8, or by its byte order mark. All line ends become newlines.

    Bytes that are not Unicode become lone surrogates, for `read_batches` to replace and count. Raises
    UserError for a file whose beginning is not text, and, also from within the block, for one that
    cannot be read to its end.
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
        raise _unreadable(path, error, "remove .gz from its name if it is plain, fetch it again") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _check_text(beginning: bytes, encoding: str, path: Path) -> None:
    """Refuses what does not begin as text in this encoding does. Raises UserError."""
    if beginning.isascii():
        foreign = "ISO-2022" if _ISO_2022.search(beginning) else "HZ" if _is_hz(beginning) else None
        if foreign is not None:
            raise _mistake(f"{path} is in {foreign}: convert it to UTF-8, or leave it out")
    # Not final: the sample may end within a character.
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


def _unreadable(path: Path, error: Exception, cure: str = "fetch it again") -> UserError:
    return _mistake(f"{path} cannot be read ({' '.join(str(error).split())}): {cure}, or leave it out")


def _matches(pattern: str) -> list[Path]:
    try:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise _mistake(
                f"`files` lists the folder {pattern}: name its files by a glob such as {pattern.rstrip('/')}/**/*.txt"
            )
        if path.is_file():
            return [path]
        fixed = next((i for i, part in enumerate(path.parts) if _MAGIC.intersection(part)), None)
        if fixed is None:
            raise _mistake(f"`files` lists {pattern}, which is no file: mend the path")
        base, glob = Path(*path.parts[:fixed]), path.parts[fixed:]
        # pathlib's `**`, unlike that of `glob`, does not follow links to folders, so loops end.
        matches = [match for match in base.glob("/".join(glob)) if match.is_file()]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _mistake(f"`files` lists {pattern!r}, which is neither a path nor a glob ({error}): mend it") from None
    if not any(part.startswith(".") for part in glob):
        # As in a shell: hidden files are matched only by a pattern with a dot.
        matches = [m for m in matches if not any(part.startswith(".") for part in m.relative_to(base).parts)]
    if not matches:
        raise _mistake(f"`files` lists the glob {pattern}, which matches no file: mend it, or remove it")
    return sorted(matches, key=Path.as_posix)


def _json_lines(path: Path) -> Iterator[str | None]:
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(RECORD_CHARACTERS + 1), ""), start=1):
            if len(line) > RECORD_CHARACTERS:
                raise _too_long(f"{path}, line {number},")
            line = line.lstrip("\ufeff")  # files with byte order marks, joined to one
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise _mistake(
                    f"{path}, line {number}, is no JSON object: give one object with the field `text` per line"
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
                raise _mistake(f"{path} has no column `text`: name the column of the documents so")
            kind = file.schema_arrow.types[file.schema_arrow.names.index("text")]
            try:
                pa.nulls(0, kind).cast(pa.large_binary())
            except pa.ArrowNotImplementedError:
                raise _mistake(f"{path} has a column `text` of type {kind}: give one of type string") from None
            for group in map(file.metadata.row_group, range(file.num_row_groups)):
                # Unpacked; the size of one column is not asked for, since Arrow aborts where that is damaged.
                if group.total_byte_size > 4 * RECORD_CHARACTERS * max(group.num_rows, 1):
                    raise _too_long(f"{path} has a record that")
            for number, batch in enumerate(file.iter_batches(batch_size=_PARQUET_RECORDS, columns=["text"])):
                # As bytes, for Arrow's text may be no UTF-8.
                values = batch.column(0).cast(pa.large_binary()).to_pylist()
                if number == 0 and "binary" in str(kind):
                    _check_text(b"".join(filter(None, values))[:_SAMPLE_BYTES], "utf-8", path)
                for value in values:
                    yield None if value is None else value.decode("utf-8", "surrogateescape")
    # A damaged name of a column is a ValueError.
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _mistake(sentence: str) -> UserError:
    """An error of one line, whatever names and libraries put into it."""
    return UserError(in_one_line(sentence))


def _too_long(record: str) -> UserError:
    return _mistake(
        f"{record} is longer than {RECORD_CHARACTERS:,} characters: cut it into several, or give it as plain text"
    )
