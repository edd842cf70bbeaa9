"""How many tokens a corpus's tokenizer has, before there is one."""

import json
import os
from pathlib import Path

from mup_moe.config.document import in_one_line
from mup_moe.config.settings import CorpusSettings
from mup_moe.encoding import read_text
from mup_moe.files import UserError, expand_home

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
