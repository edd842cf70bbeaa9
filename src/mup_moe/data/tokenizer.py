"""Byte-level BPE tokenizers: trained on a corpus, or GPT-2's."""

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
"""About how many bytes of text a tokenizer is trained on: more would cost memory and change little."""
_END_OF_TEXT = AddedToken(END_OF_TEXT, special=True, normalized=False)
_LONG_RUN = re.compile(r"\S{1024}|\s{1024}")


def train_bpe(texts: Iterable[str], size: int, vocabulary: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocabulary` tokens, or fewer if the text has no more pairs to merge.

    Trains on `texts`, which have `size` bytes of UTF-8 in total, or on a sample of about TRAINING_BYTES that is
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
    """Returns GPT-2's tokenizer of 50,257 tokens, from vocab.json and merges.txt or from the hub.

    Raises UserError if the files are not such a tokenizer or the hub is unreachable.
    """
    # `tokenizers` raises a plain Exception for every cause.
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
    """Reads a vocab.json and a merges.txt, which has one pair per line after a version line.

    Avoids the library's reader, which accepts neither byte order marks nor merges on lines that end with CR.
    """
    pairs = []
    tokens = read_vocabulary(vocabulary)
    for number, line in enumerate(read_text(merges).rstrip("\n").split("\n"), start=1):
        if line.startswith("#version"):
            continue
        first, separator, second = line.partition(" ")
        if not separator or " " in second:
            raise ValueError(f"line {number} of the merges does not have two tokens")
        pairs.append((first, second))
    return _byte_level(models.BPE(tokens, pairs))


def load(path: Path) -> Tokenizer:
    """Loads a tokenizer.json; the tokenizer is the same as `train_bpe` and `gpt2` return."""
    try:
        return _literal(Tokenizer.from_file(str(path)))
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}): make it first by naming it as a Snakemake target") from error


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return _literal(tokenizer)


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    # END_OF_TEXT spelled out in a document does not end it; tokenizer.json does not save this flag.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _sample(texts: Iterable[str], size: int) -> Iterator[str]:
    fraction = TRAINING_BYTES / size
    for text in texts:
        if fraction >= 1 or in_sample(text_digest(text), fraction):
            yield from _without_long_words(text)


def _without_long_words(text: str) -> Iterator[str]:
    """Cuts a text only inside long unbroken runs, because the trainer's time is quadratic in a word's length."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]
