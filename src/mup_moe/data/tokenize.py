"""Tokenizes a corpus into a folder: tokenizer.json, train.bin, valid.bin and manifest.json."""

import argparse
import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.config.settings import CorpusSettings
from mup_moe.data.documents import Tally, read_documents
from mup_moe.data.split import in_validation, text_digest
from mup_moe.data.spool import Spool
from mup_moe.data.tokens import END_OF_TEXT, MANIFEST, SPLITS, dtype_for
from mup_moe.files import UserError, atomic_write, remove_leftovers, write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
_BATCH_CHARACTERS = 2**21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = __doc__
    parser.add_argument("--corpus", required=True, metavar="JSON", help="an entry of `corpora` in config.yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the four files go")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads that encode; the files do not depend on it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    tokenize(parse_corpus(arguments.corpus), arguments.out, arguments.threads)


def parse_corpus(text: str) -> CorpusSettings:
    """The settings of a corpus from JSON. Raises UserError."""
    try:
        return pydantic.TypeAdapter(CorpusSettings).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--corpus is wrong{f' at `{key}`' if key else ''}: {first['msg']}") from None


def tokenize(settings: CorpusSettings, folder: Path, threads: int) -> dict[str, Any]:
    """Writes a corpus's tokenizer, token files and manifest into `folder`; returns the manifest.

    The files depend on the settings, the text and the versions that the manifest lists, and on
    nothing else. Raises UserError.
    """
    if threads < 1:
        raise UserError(f"--threads is {threads}: give at least 1")
    # Read by the library when it first encodes.
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    remove_leftovers(*(folder / name for name in (TOKENIZER, MANIFEST, *(f"{split}.bin" for split in SPLITS))))
    tally = Tally()
    with Spool(folder) as train, Spool(folder) as valid:
        _fill(train, valid, settings, tally)
        tokenizer = _tokenizer(settings, train)
        vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        assert end_of_text is not None  # both kinds of tokenizer have it
        dtype = dtype_for(vocabulary)
        # A manifest vouches for the files beside it: the old one goes before they do, the new one comes last.
        (folder / MANIFEST).unlink(missing_ok=True)
        write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))
        splits = {
            split: _encode(spool, tokenizer, end_of_text, dtype, folder / f"{split}.bin")
            for split, spool in zip(SPLITS, (train, valid), strict=True)
        }
    counts = dataclasses.asdict(tally)
    manifest = {
        "source": settings.source,
        "settings": dataclasses.asdict(settings),
        "splits": splits,
        "repaired": counts.pop("repaired"),
        "skipped": counts,
        "vocabulary": vocabulary,
        "dtype": dtype.name,
        "end_of_text": end_of_text,
        "versions": provenance.versions("tokenizers", "datasets", *settings.packages),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _fill(train: Spool, valid: Spool, settings: CorpusSettings, tally: Tally) -> None:
    with _progress("reading", settings.max_bytes) as progress:
        for text in read_documents(settings, tally):
            digest = text_digest(text)
            spool = valid if in_validation(digest, settings.validation_fraction) else train
            spool.add(text, digest)
            progress.update(train.bytes + valid.bytes - progress.n)
    documents = train.documents + valid.documents
    if documents == 0:
        raise UserError(
            f"the corpus has no text ({tally.empty} documents were empty, {tally.without_text} records had no `text`):"
            " name other files"
        )
    for name, spool, cure in (("training", train, "lower"), ("validation", valid, "raise")):
        if spool.documents == 0:
            raise UserError(
                f"the {name} split is empty, for of {documents} documents `validation_fraction`"
                f" {settings.validation_fraction} left it none: give more documents, or {cure} the fraction"
            )


def _tokenizer(settings: CorpusSettings, train: Spool) -> "Tokenizer":
    from mup_moe.data.tokenizer import gpt2, train_bpe

    if settings.tokenizer == "gpt2":
        return gpt2(settings.tokenizer_files)
    assert settings.vocabulary is not None  # CorpusSettings demands it
    return train_bpe(train, settings.vocabulary)


def _encode(
    spool: Spool, tokenizer: "Tokenizer", end_of_text: int, dtype: "np.dtype[Any]", path: Path
) -> dict[str, Any]:
    """Writes one split's token file; returns its entry in the manifest."""
    digest = hashlib.sha256()
    tokens = 0
    with atomic_write(path) as file, _progress(f"encoding {path.name}", spool.bytes) as progress:
        for batch in _batches(spool):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
                ids = np.array([*encoding.ids, end_of_text], dtype=dtype)
                data = ids.tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(ids)
                progress.update(len(text.encode()))
    return {
        "documents": spool.documents,
        "bytes": spool.bytes,
        "tokens": tokens,
        "text_sha256": spool.digest,
        "tokens_sha256": digest.hexdigest(),
    }


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts so that a group has little more than _BATCH_CHARACTERS."""
    batch: list[str] = []
    room = _BATCH_CHARACTERS
    for text in texts:
        batch.append(text)
        room -= len(text) + 100  # an encoding has a weight of its own, and documents may be tiny
        if room <= 0:
            yield batch
            batch, room = [], _BATCH_CHARACTERS
    if batch:
        yield batch


def _progress(description: str, total: int | None) -> "tqdm[Any]":
    # A log file gets few lines.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, mininterval=interval, file=sys.stderr)
