"""What is known about a corpus without its tokens: its future vocabulary, and what was left out when it was read.

Needs neither numpy nor `tokenizers`, so that a Snakefile can import it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mup_moe.config.document import in_one_line
from mup_moe.config.settings import CorpusSettings
from mup_moe.encoding import read_text
from mup_moe.files import UserError, expand_home, read_json

SPLITS = ("train", "valid")
GPT2_VOCABULARY = 50_257
_GIVE = "give GPT-2's vocab.json and merges.txt, in this order, as `tokenizer_files`"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {*map(chr, _PRINTABLE), *map(chr, range(0x100, 0x200 - len(_PRINTABLE)))}
"""The characters that represent the 256 bytes in a byte-level vocabulary."""


def vocabulary_of(corpus: CorpusSettings) -> int:
    """Returns the vocabulary size of a corpus's tokenizer; an upper bound if the tokenizer is still to be trained.

    Raises UserError if `tokenizer_files` are not those of a byte-level tokenizer.
    """
    if corpus.vocabulary is not None:
        return corpus.vocabulary
    if corpus.tokenizer_files is not None:
        return len(read_vocabulary(tokenizer_paths(corpus.tokenizer_files)[0]))
    return GPT2_VOCABULARY


def tokenizer_paths(names: tuple[str, str] | None) -> list[Path]:
    """Returns the paths of a corpus's `tokenizer_files`. Raises UserError if one is not a file."""
    paths = [expand_home(name) for name in names or ()]
    for path in paths:
        if not os.path.isfile(path):  # noqa: PTH113 - never raises, whatever the name
            raise UserError(in_one_line(f"`tokenizer_files` lists {path}, which is not a file: {_GIVE}"))
    return paths


def read_vocabulary(path: Path) -> dict[str, int]:
    """Reads each token's number from the vocab.json of a byte-level BPE. Raises UserError for any other file."""
    try:
        vocabulary = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {_GIVE}") from None
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [""]
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise UserError(f"{path} does not map tokens to consecutive numbers from 0: {_GIVE}")
    if absent := BYTES - vocabulary.keys():
        raise UserError(f"{path} is not byte-level, because it lacks {len(absent)} of the 256 bytes: {_GIVE}")
    return dict(vocabulary)


def remark_of(folder: Path) -> str | None:
    """Describes what was skipped, changed or not read in a tokenized corpus; None if nothing or without a manifest."""
    try:
        return "; ".join(_parts(read_json(folder / "manifest.json"))) or None
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _parts(manifest: Mapping[str, Any]) -> Iterator[str]:
    if manifest["source"] == "python":
        return  # not the user's text: empty files and the limit on bytes are intended
    skipped = manifest["skipped"]
    documents = sum(split["documents"] for split in manifest["splits"].values())
    # Manifests of earlier versions do not count records.
    records = manifest.get("records", documents + sum(skipped.values()))
    counts = {
        "had no `text` and {were} skipped": skipped["without_text"],
        "had only white space and {were} skipped": skipped["empty"],
        "had NUL or invalid Unicode, replaced by U+FFFD": manifest["repaired"],
        "{were} too long for one document and cut into several": manifest.get("cut", 0),
    }
    for what, count in counts.items():
        if count:
            yield f"{count:,} of {records:,} records {what.format(were='was' if count == 1 else 'were')}"
    most = manifest["settings"]["max_bytes"]
    size = sum(split["bytes"] for split in manifest["splits"].values())
    if most is not None and size >= most:
        yield f"reading stopped at `max_bytes`, after {size:,} bytes"
