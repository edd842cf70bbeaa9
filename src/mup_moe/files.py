"""Files that are either whole or absent, locks of folders, and the errors that users can put right."""

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
    """A mistake or mishap outside the code; its text is one sentence that says what to do."""


def expand_home(name: str) -> Path:
    """The path of a name that may begin with ~. Raises UserError where there is no such home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name} is in a home folder that is not known here: give the whole path") from None


_POINTER = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: Path) -> None:
    """Raises UserError for what Git LFS leaves in the place of a file, and OSError for what cannot be read."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`")


@contextmanager
def atomic_write(path: Path, mode: str = "wb", durable: bool = True) -> Iterator[IO[Any]]:
    """Opens a file that appears under `path` whole when the block ends without error.

    durable: on disk by then, so that it outlives the machine's power. Raises UserError when the disk
    is full or the folder cannot be written.
    """
    with atomic_writes(mode, durable) as write, write(path) as file:
        yield file


@contextmanager
def atomic_writes(
    mode: str = "wb", durable: bool = True, before_replace: Callable[[Path], None] | None = None
) -> Iterator[Callable[[Path], AbstractContextManager[IO[Any]]]]:
    """Yields what opens the file of a path; all of them appear together, as nearly as a file system can.

    They are whole by then. before_replace: is called with each path before its file appears there. Otherwise
    as `atomic_write`. Close one before you open the next: a process may not have many open. What killed
    processes left on their way to these paths goes: one process at a time may write a path.
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
        # mkstemp makes private files; results are to be read by others as the umask allows.
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


# What a disk says that is full, forbids writing, or fails; and what a system says of too many open files.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


def explain_disk_error(error: BaseException) -> str | None:
    """What to do about an error by which no more files are written or opened; None for any other."""
    if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS | _TOO_MANY:
        return None
    return str(_cannot_be_written(error.filename or "a file", error))


def _cannot_be_written(path: Path | str, error: OSError) -> UserError:
    return _cannot_be(f"{path} cannot be written", error, "free space or permit writing there")


def cannot_be_read(path: Path | str, error: OSError) -> UserError:
    """What to raise for a file that is there but cannot be read: its content may be right."""
    return _cannot_be(f"{path} cannot be read", error, "make it a file that you can read")


def _cannot_be(problem: str, error: OSError, remedy: str) -> UserError:
    if error.errno in _TOO_MANY:
        remedy = "let a process have more files open (ulimit -n)"
    return UserError(f"{problem} ({error.strerror or error}): {remedy}, and run the same command again")


def remove_leftovers(*paths: Path) -> None:
    """Removes what `atomic_write` left of these files when its process was killed."""
    for path in paths:
        for leftover in path.parent.glob(f".{path.name}.*.part"):
            leftover.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it. Raises UserError where that is not permitted."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be(f"{path} cannot be made", error, "permit writing there") from error


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Writes a text file atomically."""
    with atomic_write(path, "w", durable) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, keys in the order given."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text of `write_json`."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV atomically, floats in their shortest exact spelling; None and NaN are empty fields."""
    write_text(path, csv_text(header, rows))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The text of `write_csv`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if field != field else field for field in row] for row in rows)
    return text.getvalue()


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError for a file that is missing, damaged or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it with the rule that declares it") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the same command again") from None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle_times(paths: Iterable[Path], within: Path) -> list[Path]:
    """Dates the files of these that are of the future just before now, in the order that they have.

    A clock that was turned back leaves such files, and Snakemake refuses what is older than its inputs.
    Returns those that are not `within` a folder, which are left as they are.
    """
    now = time.time_ns()
    future = {}
    for path in paths:
        with suppress(OSError):
            if (changed := path.stat().st_mtime_ns) > now:
                future[path] = changed
    # What a link leads to elsewhere is part of the folder, as results on a scratch disk are.
    inside = [path for path in future if path.absolute().is_relative_to(within.absolute())]
    ages = {changed: age for age, changed in enumerate(sorted({future[path] for path in inside}, reverse=True), 1)}
    for path in inside:
        # Where the time cannot be set, Snakemake names the file.
        with suppress(OSError):
            os.utime(path, ns=(now, now - 1000 * ages[future[path]]))
    return sorted(set(future) - set(inside))


_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
# Locks are the kernel's: they go with the process, however that dies.
_HELD: list[IO[bytes]] = []


def lock_file(path: Path) -> IO[bytes] | None:
    """Locks a file, which is made, until what is returned is closed; None where it is locked already."""
    # Open for writing, too: NFS asks for that.
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
    """Locks a folder, which is made, as `lock_file`. Raises UserError."""
    make_folder(folder)
    try:
        return lock_file(folder / ".lock")
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UserError(
                f"{folder} is on a file system without file locks ({error.strerror}): put the folder on one that has"
                " them, or have it mounted with them (Lustre: -o flock)"
            ) from error
        raise _cannot_be_written(folder, error) from error


@contextmanager
def claim_folder(folder: Path) -> Iterator[bool]:
    """Holds a folder against other processes; yields whether another one had to be waited for.

    A process can outlive the workflow that started it, and two would write the same files. Raises
    UserError when the folder cannot be written.
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
    """Locks a folder against a second run, for as long as this process lives.

    Raises UserError if it is taken, or cannot be written.
    """
    while (lock := _lock(folder)) is None:
        if is_held(folder):
            raise UserError(f"another run is working in {folder}: wait for it to end, or stop it first")
        # Somebody only looks whether it is taken.
        time.sleep(_POLL_SECONDS)
    _HELD.append(lock)
    try:
        # A lock that is there already takes no writing.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def is_held(folder: Path) -> bool:
    """Whether a living process holds a folder by `hold_folder` or `claim_folder`."""
    try:
        # Shared, which needs no right to write there, and given back within microseconds.
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # there is no lock, or a file system without them
    return False
