"""Files that are either whole or absent, folder locks, and the errors that users can fix."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_POLL_SECONDS = 0.02


class UserError(RuntimeError):
    """An error whose cause is outside the code; its message is one sentence that says what to do."""


def expand_home(name: str) -> Path:
    """Returns the path for a name that may begin with ~. Raises UserError if there is no such home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name} is in a home folder that is not known on this machine: give the full path") from None


_POINTER = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: Path) -> None:
    """Raises UserError for a pointer that Git LFS left in place of a file, and OSError if it cannot be read."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`")


@contextmanager
def atomic_write(path: Path, mode: str = "wb", durable: bool = True) -> Iterator[IO[Any]]:
    """Opens a file that appears at `path`, complete, when the block ends without an error.

    durable: sync the file to disk first, so that it survives a power failure. Raises UserError if the disk
    is full or the folder cannot be written.
    """
    with atomic_writes(mode, durable) as write, write(path) as file:
        yield file


@contextmanager
def atomic_writes(
    mode: str = "wb", durable: bool = True, before_replace: Callable[[Path], None] | None = None
) -> Iterator[Callable[[Path], AbstractContextManager[IO[Any]]]]:
    """Yields a function that opens the file for a path; all files appear at the end, as close to at once as possible.

    By then all of them are complete. before_replace: called with each path before its file appears there. The rest is
    as in `atomic_write`. Close each file before opening the next, since the number of open files is limited. Deletes
    temporary files that killed processes left for these paths, so only one process at a time may write a path.
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    temporary: dict[Path, Path] = {}
    latest = Path()

    @contextmanager
    def write(path: Path) -> Iterator[IO[Any]]:
        nonlocal latest
        latest = path
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary[path] = Path(name)
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(handle)

    try:
        yield write
        # mkstemp creates private files, but others should be able to read results as the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        paths = list(temporary)
        for latest in paths:
            temporary[latest].chmod(0o666 & ~umask)
        for latest in paths:
            if before_replace is not None:
                before_replace(latest)
            temporary.pop(latest).replace(latest)
        if durable:
            for folder in {path.parent for path in paths}:
                handle = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
    except OSError as error:
        raise _cannot_be_written(latest, error) from error
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


# Errors of a disk that is full, read-only or failing; and errors for too many open files.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


def explain_disk_error(error: BaseException) -> str | None:
    """Returns what to do about a disk error or too many open files; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS | _TOO_MANY:
        return None
    return str(_cannot_be_written(error.filename or "a file", error))


def _cannot_be_written(path: Path | str, error: OSError) -> UserError:
    return _cannot_be(f"{path} cannot be written", error, "free space or permit writing there")


def cannot_be_read(path: Path | str, error: OSError) -> UserError:
    """Returns the error for a file that exists but cannot be read; its content may be intact."""
    return _cannot_be(f"{path} cannot be read", error, "make it a file that you can read")


def _cannot_be(problem: str, error: OSError, remedy: str) -> UserError:
    if error.errno in _TOO_MANY:
        remedy = "raise the limit of open files (ulimit -n)"
    return UserError(f"{problem} ({error.strerror or error}): {remedy}, and run the same command again")


def remove_leftovers(*paths: Path) -> None:
    """Deletes the temporary files that `atomic_write` left for these paths when its process was killed."""
    for path in paths:
        for leftover in path.parent.glob(f".{path.name}.*.part"):
            leftover.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents. Raises UserError if that is not permitted."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be(f"{path} cannot be created", error, "permit writing there") from error


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Writes a text file atomically."""
    with atomic_write(path, "w", durable) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, with keys in the given order."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns the text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV atomically, with floats in their shortest exact form; None and NaN become empty fields."""
    write_text(path, csv_text(header, rows))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns the text that `write_csv` writes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if field != field else field for field in row] for row in rows)
    return text.getvalue()


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError if the file is missing, damaged or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it first by naming it as a Snakemake target") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the same command again") from None


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle_times(paths: Iterable[Path], within: Path) -> list[Path]:
    """Sets files with modification times in the future to just before now, keeping their order.

    Such files appear when a clock is set back, and Snakemake refuses outputs that are older than their inputs.
    Leaves files outside the folder `within` as they are, and returns those that are from the future.
    """
    now = time.time_ns()
    future = {}
    for path in paths:
        with suppress(OSError):
            if (changed := path.stat().st_mtime_ns) > now:
                future[path] = changed
    # Do not resolve links: results on a scratch disk that the folder links to are part of the folder.
    inside = [path for path in future if path.absolute().is_relative_to(within.absolute())]
    ages = {changed: age for age, changed in enumerate(sorted({future[path] for path in inside}, reverse=True), 1)}
    for path in inside:
        # If the time cannot be set, Snakemake will name the file.
        with suppress(OSError):
            os.utime(path, ns=(now, now - 1000 * ages[future[path]]))
    return sorted(set(future) - set(inside))


_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
# The kernel releases these locks when the process ends, however it ends.
_HELD: list[IO[bytes]] = []


def lock_file(path: Path) -> IO[bytes] | None:
    """Locks a file, creating it if needed, until the returned file is closed; None if it is already locked."""
    # Open for writing as well, because NFS requires it.
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            return None
        raise


def _lock(folder: Path) -> IO[bytes] | None:
    """Locks a folder as `lock_file` does, creating it if needed. Raises UserError."""
    make_folder(folder)
    try:
        return lock_file(folder / ".lock")
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UserError(
                f"{folder} is on a file system without file locks ({error.strerror}): move the folder to one that"
                " supports them, or mount it with locks enabled (Lustre: -o flock)"
            ) from error
        raise _cannot_be_written(folder, error) from error


@contextmanager
def claim_folder(folder: Path) -> Iterator[bool]:
    """Locks a folder against other processes during the block; yields whether it had to wait for another one.

    A process can outlive the workflow that started it, and then two would write the same files. Raises
    UserError if the folder cannot be written.
    """
    lock = _lock(folder)
    waited = lock is None
    if waited:
        print(f"another process is working in {folder}; waiting for it", file=sys.stderr, flush=True)
    while lock is None:
        time.sleep(_POLL_SECONDS)
        lock = _lock(folder)
    with lock:
        yield waited


def hold_folder(folder: Path) -> None:
    """Locks a folder against a second run until this process ends.

    Raises UserError if another run holds it or if it cannot be written.
    """
    while (lock := _lock(folder)) is None:
        if is_held(folder):
            raise UserError(f"another run is working in {folder}: wait for it to end, or stop it first")
        # Another process is only checking the lock, in `is_held`.
        time.sleep(_POLL_SECONDS)
    _HELD.append(lock)
    try:
        # Locking an existing lock file does not show whether the folder is writable.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def is_held(folder: Path) -> bool:
    """Returns whether a live process holds a folder through `hold_folder` or `claim_folder`."""
    try:
        # A shared lock needs no write permission; it is released within microseconds.
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock file, or a file system without locks
    return False
