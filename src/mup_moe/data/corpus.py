"""What is known of a corpus without its tokens: its vocabulary beforehand, and what reading it left out.

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
"""The character by which a byte-level vocabulary spells each byte."""


def vocabulary_of(corpus: CorpusSettings) -> int:
    """The tokens that a corpus's tokenizer will have; at most as many, where it is yet to be trained.

    Raises UserError where `tokenizer_files` are not those of a byte-level tokenizer.
    """
    if corpus.vocabulary is not None:
        return corpus.vocabulary
    if corpus.tokenizer_files is not None:
        return len(read_vocabulary(tokenizer_paths(corpus.tokenizer_files)[0]))
    return GPT2_VOCABULARY


def tokenizer_paths(names: tuple[str, str] | None) -> list[Path]:
    """Where a corpus's `tokenizer_files` are. Raises UserError for what is not a file."""
    paths = [expand_home(name) for name in names or ()]
    for path in paths:
        if not os.path.isfile(path):  # noqa: PTH113 - raises nothing, whatever the name
            raise UserError(in_one_line(f"`tokenizer_files` lists {path}, which is not a file: {_GIVE}"))
    return paths


def read_vocabulary(path: Path) -> dict[str, int]:
    """The number of each token, as the vocab.json of a byte-level BPE has it. Raises UserError for any other file."""
    try:
        vocabulary = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {_GIVE}") from None
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [""]
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise UserError(f"{path} does not map tokens to the numbers from 0 on, each once: {_GIVE}")
    if absent := BYTES - vocabulary.keys():
        raise UserError(f"{path} is not byte-level, as it lacks {len(absent)} of the 256 bytes: {_GIVE}")
    return dict(vocabulary)


def remark_of(folder: Path) -> str | None:
    """What of a tokenized corpus was skipped, changed or not read; None for nothing, and without a sound manifest."""
    try:
        return "; ".join(_parts(read_json(folder / "manifest.json"))) or None
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _parts(manifest: Mapping[str, Any]) -> Iterator[str]:
    if manifest["source"] == "python":
        return  # no text of the user's: its empty files and its end are meant
    skipped = manifest["skipped"]
    documents = sum(split["documents"] for split in manifest["splits"].values())
    # Manifests of earlier versions do not count records.
    records = manifest.get("records", documents + sum(skipped.values()))
    counts = {
        "had no `text` and {were} skipped": skipped["without_text"],
        "held nothing but white space and {were} skipped": skipped["empty"],
        "held NUL or what is not Unicode, replaced by U+FFFD": manifest["repaired"],
        "{were} too long for one document and cut into several": manifest.get("cut", 0),
    }
    for what, count in counts.items():
        if count:
            yield f"{count:,} of {records:,} records {what.format(were='was' if count == 1 else 'were')}"
    most = manifest["settings"]["max_bytes"]
    size = sum(split["bytes"] for split in manifest["splits"].values())
    if most is not None and size >= most:
        yield f"reading ended at `max_bytes`, after {size:,} bytes"
