"""Python source as text: the standard library and installed packages. Nothing is downloaded."""

import os
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePath

from mup_moe.data.text_files import open_text
from mup_moe.files import UserError

_TESTS = {"test", "tests", "idle_test"}
_OTHERS = {"site-packages", "dist-packages", "__pycache__"}


def find(packages: tuple[str, ...]) -> list[Path]:
    """Returns the standard library's files, sorted by path, and then each package's files, sorted by path.

    Leaves out tests and files in which an installation records its own path. Raises UserError for a package
    that is not installed.
    """
    return [*_standard_library(), *(file for package in packages for file in _files_of(package))]


def read_file(path: Path) -> Iterator[str]:
    """Yields the text of a file, as one text. Raises UserError if the file cannot be read."""
    with open_text(path) as file:
        yield file.read()


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if _wanted(inside / name)]
        found += [inside / name for name in names if name.endswith(".py") and _wanted(inside / name)]
    return [root / path for path in sorted(found, key=PurePath.as_posix)]


def _wanted(path: PurePath) -> bool:
    names_its_place = path.parts[0].startswith(("_sysconfigdata", "config-"))
    return not names_its_place and not (_TESTS | _OTHERS).intersection(path.parts)


def _files_of(package: str) -> list[Path]:
    try:
        listed = metadata.files(package)
    except (metadata.PackageNotFoundError, ValueError):
        listed = None
    if not listed:
        raise UserError(
            f"`packages` lists {package!r}, which is not installed or was installed without a list of its files:"
            " install it with pip, or remove it from `packages`"
        )
    # Files outside of site-packages are scripts, and their first line has the interpreter's path.
    sources = [
        file
        for file in listed
        if file.suffix == ".py" and file.parts[0] != ".." and not _TESTS.intersection(file.parts)
    ]
    return [Path(file.locate()) for file in sorted(sources, key=PurePath.as_posix)]
