"""Tokenizes a corpus into a folder: tokenizer.json, train.bin, valid.bin and manifest.json.

Its progress is kept in the folder's `.work/`; if it is killed, rerun the same command to continue.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.config.settings import CorpusSettings
from mup_moe.data import work
from mup_moe.data.corpus import SPLITS, tokenizer_paths
from mup_moe.data.documents import Batch, Place, open_source, read_batches, source_files
from mup_moe.data.tokens import END_OF_TEXT, MANIFEST, dtype_for
from mup_moe.files import (
    UserError,
    atomic_write,
    claim_folder,
    file_digest,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
WORK = ".work"
_TEXT = "text"
_Made: TypeAlias = dict[str, bytes]  # file name -> bytes to append


def tokenize(settings: CorpusSettings, folder: Path, threads: int) -> dict[str, Any]:
    """Writes a corpus's tokenizer, token files and manifest into `folder`; returns the manifest.

    The files depend only on the settings, the text and the versions that the manifest lists, not on
    `threads` or on where earlier runs were killed. Raises UserError.
    """
    if threads < 1:
        raise UserError(f"--threads is {threads}: give at least 1")
    # The library reads these when it first encodes.
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    owner = _owner(settings)
    doing = work.owner(folder / WORK)
    with claim_folder(folder) as waited:
        if waited and doing == owner and work.owner(folder / WORK) is None and (folder / MANIFEST).exists():
            return dict(read_json(folder / MANIFEST))  # the other process has just done the same work
        remove_leftovers(*(folder / name for name in (TOKENIZER, MANIFEST, *(f"{split}.bin" for split in SPLITS))))
        work.begin(folder / WORK, owner)
        manifest = _tokenize(settings, folder, folder / WORK)
        work.remove(folder / WORK)
    return manifest


def _owner(settings: CorpusSettings) -> str:
    """Returns all that the work depends on. Text counts by name, size and time, as reading it would take too long."""
    files = tokenizer_paths(settings.tokenizer_files)
    if settings.source != "c4" or settings.files:
        files = [*source_files(settings), *files]
    parts = {
        "settings": dataclasses.asdict(settings),
        "versions": _versions(settings),
        "code": provenance.source_digest(sorted(Path(__file__).parent.glob("*.py"))),
        "files": [[str(path), *_size_and_time(path)] for path in files],
    }
    return json.dumps(parts)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)  # reading the file will report the error
    return (status.st_size, status.st_mtime_ns)


def _versions(settings: CorpusSettings) -> dict[str, str]:
    return provenance.versions("tokenizers", "datasets", *settings.packages)


def _tokenize(settings: CorpusSettings, folder: Path, kept: Path) -> dict[str, Any]:
    # GPT-2 tokens are made while the text is read; a tokenizer that is trained needs all of the text first.
    trained = settings.tokenizer == "bpe"
    read = _spool(settings, kept) if trained else None
    tokenizer = _tokenizer(settings, kept, read)
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None  # both kinds of tokenizer have it
    dtype = dtype_for(vocabulary)
    encoded = _encode(settings, kept, read, tokenizer, end_of_text, dtype)
    read = read or encoded
    _check_splits(settings, read)
    # A manifest certifies the files next to it, so delete the old one before them and write the new one last.
    (folder / MANIFEST).unlink(missing_ok=True)
    write_text(folder / TOKENIZER, (kept / TOKENIZER).read_text(encoding="utf-8"))
    splits = {}
    for split in SPLITS:
        # Copy rather than move, because Snakemake deletes the outputs of an unfinished job.
        _copy(kept / f"{split}.bin", folder / f"{split}.bin")
        splits[split] = dataclasses.asdict(read.counts[split]) | {
            "tokens": (folder / f"{split}.bin").stat().st_size // dtype.itemsize,
            "text_sha256": file_digest(kept / f"{split}.digests"),
            "tokens_sha256": file_digest(folder / f"{split}.bin"),
        }
    manifest = {
        "source": settings.source,
        "settings": dataclasses.asdict(settings),
        "splits": splits,
        "records": read.records,
        "repaired": read.tally.repaired,
        "cut": read.tally.cut,
        "skipped": {"empty": read.tally.empty, "without_text": read.tally.without_text},
        "vocabulary": vocabulary,
        "dtype": dtype.name,
        "end_of_text": end_of_text,
        "versions": _versions(settings),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _spool(settings: CorpusSettings, kept: Path) -> Place:
    """Reads the corpus into one file for encoding; returns the place at its end."""
    with closing(work.Stage(kept, "reading", (_TEXT,))) as stage:
        place = Place.from_json(stage.note)
        with _progress("reading", settings.max_bytes, place) as progress:
            for batch in _from_source(settings, place):
                stage.append(_TEXT, b"".join(work.pack(document.text) for document in batch.documents))
                place = _commit(stage, progress, batch, place)
    _check_splits(settings, place)
    return place


def _from_source(settings: CorpusSettings, place: Place) -> Iterator[Batch]:
    if not place.finished:  # do not contact the hub if nothing is left to read
        source = open_source(settings, place.position)
        yield from read_batches(source, place, settings.validation_fraction, settings.max_bytes)


def _check_splits(settings: CorpusSettings, place: Place) -> None:
    if place.documents == 0:
        raise UserError(
            f"the corpus has no text ({place.tally.empty} documents were empty,"
            f" {place.tally.without_text} records had no `text`): name other files"
        )
    for name, split, remedy in (("training", "train", "lower"), ("validation", "valid", "raise")):
        if place.counts[split].documents == 0:
            raise UserError(
                f"the {name} split is empty, because `validation_fraction` {settings.validation_fraction} put none of"
                f" the {place.documents} documents into it: give more documents, or {remedy} the fraction"
            )


def _tokenizer(settings: CorpusSettings, kept: Path, read: Place | None) -> "Tokenizer":
    from mup_moe.data import tokenizer

    path = kept / TOKENIZER
    if not path.exists():
        if read is None:
            made = tokenizer.gpt2(settings.tokenizer_files)
        else:
            assert settings.vocabulary is not None  # CorpusSettings requires it
            batches = read_batches(work.Spool(kept / _TEXT), Place(), settings.validation_fraction)
            texts = (document.text for batch in batches for document in batch.documents if document.split == "train")
            made = tokenizer.train_bpe(texts, read.counts["train"].bytes, settings.vocabulary)
        write_text(path, made.to_str(pretty=True))
    return tokenizer.load(path)


def _encode(
    settings: CorpusSettings,
    kept: Path,
    read: Place | None,
    tokenizer: "Tokenizer",
    end_of_text: int,
    dtype: "np.dtype[Any]",
) -> Place:
    """Makes each split's tokens and document digests, from the text that was read or directly from the source."""

    def encode(batch: Batch) -> _Made:
        made: dict[str, list[bytes]] = {name: [] for name in files}
        encodings = tokenizer.encode_batch_fast([document.text for document in batch.documents])
        for document, encoding in zip(batch.documents, encodings, strict=True):
            ids = [*encoding.ids, end_of_text]
            made[f"{document.split}.bin"].append(np.fromiter(ids, dtype, len(ids)).tobytes())
            made[f"{document.split}.digests"].append(document.digest)
        return {name: b"".join(parts) for name, parts in made.items()}

    files = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "digests"))
    with closing(work.Stage(kept, "encoding", files)) as stage:
        place = Place.from_json(stage.note)
        if read is None:
            batches = _from_source(settings, place)
            total = settings.max_bytes
        else:
            batches = read_batches(work.Spool(kept / _TEXT, place.position), place, settings.validation_fraction)
            total = read.bytes
        with _progress("encoding", total, place) as progress:
            for batch, made in _ahead(encode, batches):
                for name, data in made.items():
                    stage.append(name, data)
                place = _commit(stage, progress, batch, place)
    return place


def _ahead(encode: Callable[[Batch], _Made], batches: Iterator[Batch]) -> Iterator[tuple[Batch, _Made]]:
    """Encodes batches in order while reading ahead; holds few at a time."""
    pending: deque[tuple[Batch, Future[_Made]]] = deque()
    # The library has its own threads, and the next batch should be ready when it finishes one.
    with ThreadPoolExecutor(2) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > 2:
                batch, future = pending.popleft()
                yield batch, future.result()
        for batch, future in pending:
            yield batch, future.result()


def _commit(stage: work.Stage, progress: "tqdm[Any]", batch: Batch, before: Place) -> Place:
    """Commits the output of a batch and returns the place after it."""
    if batch.after is None:
        return before
    stage.commit(dataclasses.asdict(batch.after), now=batch.after.finished)
    progress.update(batch.after.bytes - before.bytes)
    return batch.after


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, atomic_write(target) as copy:
        shutil.copyfileobj(file, copy)


def _progress(description: str, total: int | None, place: Place) -> "tqdm[Any]":
    if place.bytes:
        print(f"{description}: continuing after {place.bytes:,} bytes of text", file=sys.stderr, flush=True)
    # Write few lines if stderr is a log file.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        desc=description,
        total=total,
        initial=place.bytes,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        file=sys.stderr,
    )
