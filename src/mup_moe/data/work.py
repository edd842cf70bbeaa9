"""Work in progress on disk: what a killed run leaves for the next one to continue."""

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
"""How much work a kill may cost; a commit takes some milliseconds and the writing of the files."""
_OWNER = "owner.json"


def owner(folder: Path) -> str | None:
    """What the work in a folder belongs to; None where there is no work. Raises UserError where it cannot be read."""
    try:
        return (folder / _OWNER).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise cannot_be_read(folder / _OWNER, error) from None


def begin(folder: Path, new_owner: str) -> None:
    """Makes the folder ready for the work of this owner: empty, unless it holds that already.

    Raises UserError when it cannot be written.
    """
    if owner(folder) == new_owner:
        return
    # What has no owner was on its way out.
    if owner(folder) is not None:
        print(f"{folder} is of other settings, text or code: starting from the beginning", file=sys.stderr)
    remove(folder)
    write_text(folder / _OWNER, new_owner)


def remove(folder: Path) -> None:
    """Removes work; killed on the way, it leaves what belongs to nobody."""
    with _disk_errors(folder):
        (folder / _OWNER).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


class Stage:
    """Files that only grow, and a note (JSON) of where the work stood when they were last committed.

    Opening a stage cuts its files back to the last commit, so that files and note agree whenever
    and however the process before was killed. Raises UserError when the disk is full, or the note cannot be read.
    """

    def __init__(self, folder: Path, name: str, files: tuple[str, ...]) -> None:
        self._folder = folder
        self._record = folder / f"{name}.json"
        self._committed_at = time.monotonic()
        self.note: Any = None  # as given to the last commit; None before the first
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
        """Adds to one of the files."""
        with _disk_errors(self._folder):
            self._files[file].write(data)

    def commit(self, note: Any, now: bool = False) -> None:
        """Makes what was appended last, together with `note`; at most every COMMIT_SECONDS unless `now`."""
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
    """A document as a `Spool`'s file holds it: a line of JSON."""
    return json.dumps(text, ensure_ascii=False).encode() + b"\n"


class Spool:
    """Documents kept between reading and encoding: a file of `pack`ed ones, from the beginning or from a `position`.

    So a source is read once (C4 comes over the network), and the tokenizer is trained on the very
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
        """The byte after the document last given."""
        return self._position


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"work cannot be kept in {folder} ({error.strerror}): free space or permit writing there,"
            " and run the same command again"
        ) from error
