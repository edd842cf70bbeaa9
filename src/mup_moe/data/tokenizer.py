"""Byte-level BPE: trained on a corpus, or GPT-2's."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mup_moe.data.corpus import read_vocabulary, tokenizer_paths
from mup_moe.data.documents import in_sample, text_digest
from mup_moe.data.tokens import END_OF_TEXT
from mup_moe.encoding import read_text
from mup_moe.files import UserError

TRAINING_BYTES = 2**26
"""About as much text as a tokenizer is trained on: more of it costs memory and changes little."""
_END_OF_TEXT = AddedToken(END_OF_TEXT, special=True, normalized=False)
_LONG_RUN = re.compile(r"\S{1024}|\s{1024}")


def train_bpe(texts: Iterable[str], size: int, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens, or fewer where the text has no more pairs to merge.

    Trained on `texts`, of `size` bytes of UTF-8 together, or on a sample of TRAINING_BYTES of them
    chosen by their digests. Token 0 is END_OF_TEXT and tokens 1 to 256 are the bytes.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_sample(texts, size), trainer)
    return tokenizer


def gpt2(files: tuple[str, str] | None) -> Tokenizer:
    """GPT-2's tokenizer, 50,257 tokens: from vocab.json and merges.txt, or from the hub.

    Raises UserError when the files are no such tokenizer, or the hub is out of reach.
    """
    # `tokenizers` raises plain Exception, whatever the cause.
    try:
        tokenizer = _from_files(*tokenizer_paths(files)) if files else Tokenizer.from_pretrained("gpt2")
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if files:
            raise UserError(
                f"`tokenizer_files` {' and '.join(files)} cannot be read ({reason}):"
                " give GPT-2's vocab.json and merges.txt, in this order"
            ) from error
        raise UserError(
            f"the GPT-2 tokenizer cannot be fetched from the Hugging Face hub ({reason}):"
            " give its vocab.json and merges.txt as the corpus's `tokenizer_files`"
        ) from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UserError(
            f"the tokenizer lacks {END_OF_TEXT}: give GPT-2's own vocab.json and merges.txt as `tokenizer_files`"
        )
    tokenizer.add_special_tokens([_END_OF_TEXT])
    return _literal(tokenizer)


def _from_files(vocabulary: Path, merges: Path) -> Tokenizer:
    """The tokenizer of a vocab.json and a merges.txt, which has a pair a line after that of the version.

    Not by the library's reader, which takes no byte order mark, and no merges from lines that CR ends.
    """
    pairs = []
    tokens = read_vocabulary(vocabulary)
    for number, line in enumerate(read_text(merges).rstrip("\n").split("\n"), start=1):
        if line.startswith("#version"):
            continue
        first, separator, second = line.partition(" ")
        if not separator or " " in second:
            raise ValueError(f"line {number} of the merges is not two tokens")
        pairs.append((first, second))
    return _byte_level(models.BPE(tokens, pairs))


def load(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, as `train_bpe` and `gpt2` return it."""
    try:
        return _literal(Tokenizer.from_file(str(path)))
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}): make it with the rule that declares it") from error


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return _literal(tokenizer)


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    # A document that spells out END_OF_TEXT has not ended; tokenizer.json does not keep this flag.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _sample(texts: Iterable[str], size: int) -> Iterator[str]:
    fraction = TRAINING_BYTES / size
    for text in texts:
        if fraction >= 1 or in_sample(text_digest(text), fraction):
            yield from _without_long_words(text)


def _without_long_words(text: str) -> Iterator[str]:
    """Cuts a text inside unbroken runs only: the trainer's time is quadratic in a word's length."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]
