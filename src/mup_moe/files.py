"""Files that are either whole or absent, and the errors that users can mend."""

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

from filelock import FileLock, Timeout


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
                _sync_folder(folder)
    except OSError as error:
        raise UserError(_cannot_be_written(latest, error)) from error
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
    return _cannot_be_written(error.filename or "a file", error)


def _cannot_be_written(path: Path | str, error: OSError) -> str:
    return _cannot_be(f"{path} cannot be written", error, "free space or permit writing there")


def cannot_be_read(path: Path | str, error: OSError) -> UserError:
    """What to raise for a file that is there but cannot be read: its content may be right."""
    return UserError(_cannot_be(f"{path} cannot be read", error, "make it a file that you can read"))


def _cannot_be(problem: str, error: OSError, remedy: str) -> str:
    if error.errno in _TOO_MANY:
        remedy = "let a process have more files open (ulimit -n)"
    return f"{problem} ({error.strerror or error}): {remedy}, and run the same command again"


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
        raise UserError(
            f"{path} cannot be made ({error.strerror}): permit writing there, and run the same command again"
        ) from error


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
    outside = []
    now = time.time_ns()
    future: dict[int, list[Path]] = {}
    for path in paths:
        # Whose time cannot be set, Snakemake names.
        with suppress(OSError):
            if (changed := path.stat().st_mtime_ns) > now:
                # What a link leads to elsewhere is part of the folder, as results on a scratch disk are.
                if path.absolute().is_relative_to(within.absolute()):
                    future.setdefault(changed, []).append(path)
                else:
                    outside.append(path)
    for age, changed in enumerate(sorted(future, reverse=True), start=1):
        for path in future[changed]:
            with suppress(OSError):
                os.utime(path, ns=(now, now - age * 1000))
    return sorted(outside)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


def _lock_of(folder: Path) -> FileLock:
    """The lock of a folder, which is made. Raises UserError where its file system knows no locks."""
    make_folder(folder)
    path = folder / ".lock"
    try:
        # For reading, too: NFS asks for that.
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        # Whatever else is the matter, acquiring the lock tells; here, FileLock would fall back to files that
        # outlive a kill.
        if error.errno in _NO_LOCKS:
            raise UserError(
                f"{folder} is on a file system without file locks ({error.strerror}): put the folder on one that has"
                " them, or have it mounted with them (Lustre: -o flock)"
            ) from error
    return FileLock(path)


@contextmanager
def claim_folder(folder: Path) -> Iterator[bool]:
    """Holds a folder against other processes; yields whether another one had to be waited for.

    A process can outlive the workflow that started it, and two would write the same files. Raises
    UserError when the folder cannot be written.
    """
    lock = _lock_of(folder)
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is working in {folder}; waiting for it", file=sys.stderr, flush=True)
        waited = True
        lock.acquire()
    except OSError as error:
        raise UserError(_cannot_be_written(folder, error)) from error
    try:
        yield waited
    finally:
        lock.release()


_HELD: list[FileLock] = []


def hold_folder(folder: Path) -> None:
    """Locks a folder against a second run, for as long as this process lives.

    The lock is the kernel's: it goes with the process, however that dies. Raises UserError if taken, or
    if the folder cannot be written.
    """
    lock = _lock_of(folder)
    try:
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if is_held(folder):
                    raise UserError(
                        f"another run is working in {folder}: wait for it to end, or stop it first"
                    ) from None
                # Somebody only looks whether it is taken.
                time.sleep(0.02)
        # A lock that is there already takes no writing.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(_cannot_be_written(folder, error)) from error
    _HELD.append(lock)


def is_held(folder: Path) -> bool:
    """Whether a living process holds a folder by `hold_folder` or `claim_folder`."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, which needs no right to write there, and given back within microseconds.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(handle)
    return False
