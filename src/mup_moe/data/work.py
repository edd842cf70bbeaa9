"""Work in progress on disk, which the next run continues after a kill."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mup_moe.files import UserError, cannot_be_read, remove_leftovers, write_json, write_text

COMMIT_SECONDS = 5.0
"""Seconds of work that a kill may cost; a commit takes some milliseconds plus the time to write the files."""
_OWNER = "owner.json"


def owner(folder: Path) -> str | None:
    """Returns the owner of the work in a folder; None if there is no work. Raises UserError if it cannot be read."""
    try:
        return (folder / _OWNER).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise cannot_be_read(folder / _OWNER, error) from None


def begin(folder: Path, new_owner: str) -> None:
    """Prepares the folder for the work of this owner: empties it, unless the work there is already of this owner.

    Raises UserError if it cannot be written.
    """
    if owner(folder) == new_owner:
        return
    # Work without an owner was being removed.
    if owner(folder) is not None:
        print(f"{folder} is from other settings, text or code: starting from the beginning", file=sys.stderr)
    remove(folder)
    write_text(folder / _OWNER, new_owner)


def remove(folder: Path) -> None:
    """Removes the work in a folder, its owner first: if this is killed, the rest has no owner."""
    with _disk_errors(folder):
        (folder / _OWNER).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


class Stage:
    """Files that only grow, with a note (JSON) of the progress at their last commit.

    Opening a stage truncates its files to the last commit, so that files and note agree whenever
    and however the previous process was killed. Raises UserError if the disk is full or the note cannot be read.
    """

    def __init__(self, folder: Path, name: str, files: tuple[str, ...]) -> None:
        self._folder = folder
        self._record = folder / f"{name}.json"
        self._committed_at = time.monotonic()
        self.note: Any = None  # from the last commit; None before the first
        lengths = self._lengths(files)
        self._files: dict[str, IO[bytes]] = {}
        with _disk_errors(folder):
            remove_leftovers(self._record)
            for file in files:
                self._files[file] = (folder / file).open("ab")
                self._files[file].truncate(lengths[file])
                self._files[file].seek(lengths[file])

    def close(self) -> None:
        """Closes the files."""
        with _disk_errors(self._folder):
            for file in self._files.values():
                file.close()

    def append(self, file: str, data: bytes) -> None:
        """Appends to one of the files."""
        with _disk_errors(self._folder):
            self._files[file].write(data)

    def commit(self, note: Any, now: bool = False) -> None:
        """Makes the appended data and `note` durable; at most every COMMIT_SECONDS unless `now`."""
        if not now and time.monotonic() - self._committed_at < COMMIT_SECONDS:
            return
        with _disk_errors(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            lengths = {name: file.tell() for name, file in self._files.items()}
        write_json(self._record, {"note": note, "lengths": lengths})
        self.note = note
        self._committed_at = time.monotonic()

    def _lengths(self, files: tuple[str, ...]) -> dict[str, int]:
        try:
            saved = json.loads(self._record.read_bytes())
            lengths = {file: int(saved["lengths"][file]) for file in files}
            if all((self._folder / file).stat().st_size >= length for file, length in lengths.items()):
                self.note = saved["note"]
                return lengths
        except (FileNotFoundError, KeyError, TypeError, ValueError, RecursionError):
            pass
        except OSError as error:
            raise cannot_be_read(error.filename or self._record, error) from None
        return dict.fromkeys(files, 0)


def pack(text: str) -> bytes:
    """Returns a document as a line of JSON, the format of a `Spool`'s file."""
    return json.dumps(text, ensure_ascii=False).encode() + b"\n"


class Spool:
    """A file of `pack`ed documents, kept between reading and encoding; read from the beginning or from a `position`.

    It lets a source be read only once (C4 comes over the network), and ensures that the tokenizer is trained on the
    text that is encoded.
    """

    def __init__(self, path: Path, position: int | None = None) -> None:
        self._path = path
        self._position = position or 0

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                self._position += len(line)
                yield json.loads(line)

    def position(self) -> int:
        """Returns the offset of the byte after the last document."""
        return self._position


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"work cannot be written to {folder} ({error.strerror}): free space or permit writing there,"
            " and run the same command again"
        ) from error
