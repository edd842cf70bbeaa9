"""Archives of whole cells, for transfer between machines: cells-000.tar.gz, cells-001.tar.gz, ..."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.files import UserError, atomic_write, make_folder
from mup_moe.ops.cell_folder import HISTORY, SUMMARY, Result

# More than a history of 100,000 steps needs; a damaged archive must not fill the disk.
_MOST_BYTES = 64 * 2**20
# Halves the size of numbers in text, in a third of the time of the highest level.
_LEVEL = 6


class CellArchives:
    """The archives in a folder, to which cells can be added.

    part_bytes: the size at which an archive is full. An archive is only ever replaced atomically by one that
    has more cells, so a kill loses nothing that was packed. Raises UserError for a damaged archive.
    """

    def __init__(self, folder: Path, part_bytes: int) -> None:
        make_folder(folder)
        self._folder = folder
        self._part_bytes = part_bytes
        self._paths = sorted(folder.glob("cells-*.tar.gz"))
        # The files of the cells in the last archive, and the summaries of the cells in all archives.
        self._open: dict[str, dict[str, bytes]] = {}
        self._summaries: dict[str, bytes] = {}
        for path in self._paths:
            self._open = {cell.id: files for cell, files in read_archive(path)}
            self._summaries |= {cell: files[SUMMARY] for cell, files in self._open.items()}

    def add(self, folders: Iterable[Path]) -> list[Path]:
        """Packs the results in these folders that are not packed yet, and returns the archives that it wrote."""
        waiting = {}
        for folder in folders:
            files = {path.name: path.read_bytes() for path in Result(folder).kept_files}
            if self._summaries.get(folder.name) != files[SUMMARY]:
                waiting[folder.name] = files
        written = []
        while waiting:
            if not self._paths or self._paths[-1].stat().st_size >= self._part_bytes:
                self._paths.append(self._folder / f"cells-{len(self._paths):03d}.tar.gz")
                self._open = {}
            self._extend(self._paths[-1], waiting)
            written.append(self._paths[-1])
        return written

    def _extend(self, path: Path, waiting: dict[str, dict[str, bytes]]) -> None:
        """Moves at least one cell from `waiting` into the archive, and more until the archive is full."""
        cells = {cell: files for cell, files in self._open.items() if cell not in waiting}
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=_LEVEL) as tar:
            for cell, files in cells.items():
                _put(tar, cell, files)
            for number, cell in enumerate(list(waiting)):
                if number and file.tell() >= self._part_bytes:
                    break
                cells[cell] = waiting.pop(cell)
                _put(tar, cell, cells[cell])
        self._open = cells
        self._summaries |= {cell: files[SUMMARY] for cell, files in cells.items()}


def _put(tar: tarfile.TarFile, cell: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        member = tarfile.TarInfo(f"{cell}/{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def read_archive(path: Path) -> Iterator[tuple[Cell, dict[str, bytes]]]:
    """Yields each cell of an archive with its two files. Raises UserError."""
    found: dict[str, dict[str, bytes]] = {}
    try:
        # Read everything first, because gzip verifies its checksum only at the end.
        with gzip.open(path) as packed:
            content = packed.read()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                cell, _, name = member.name.partition("/")
                Cell.parse(cell)
                if not member.isfile() or name not in (HISTORY, SUMMARY) or member.size > _MOST_BYTES:
                    raise ValueError(f"{member.name!r} is not part of a cell")
                file = tar.extractfile(member)
                assert file is not None, "a regular file"
                found.setdefault(cell, {})[name] = file.read()
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} is not an archive of cells ({error}): pack and copy it again") from None
    for cell, files in found.items():
        if set(files) != {HISTORY, SUMMARY}:
            raise UserError(f"{path} has only part of {cell}: pack and copy it again")
        yield Cell.parse(cell), files


def pack_logs(paths: Iterable[Path], archive: Path) -> None:
    """Packs the existing logs into one archive, replacing the previous one."""
    with atomic_write(archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=_LEVEL) as tar:
        for path in paths:
            if path.exists():
                _put(tar, "logs", {path.name: path.read_bytes()})
