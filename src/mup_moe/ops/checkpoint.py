"""Checkpoints: whole or absent, checked by digest, loaded without executing code; two generations of each.

Only what saves or loads tensors imports torch: `status` reads headers without it.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from mup_moe.files import atomic_writes, remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


class DamagedCheckpointError(Exception):
    """The file is not what `checkpoint.save` wrote."""


@dataclass(frozen=True)
class CheckpointHeader:
    """After how many steps a checkpoint was written, of which run, and after how many seconds of training."""

    step: int
    elapsed: float
    fingerprint: str


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file, and what its header says. Raises DamagedCheckpointError for all that is wrong with either."""
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            yield file, file.metadata() or {}
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise DamagedCheckpointError(f"{type(error).__name__}: {error}") from error


def _header(metadata: Mapping[str, str]) -> tuple[int, float, str]:
    return int(metadata["step"]), float(metadata["elapsed"]), metadata["fingerprint"]


def read_header(path: Path) -> CheckpointHeader:
    """The header of a file, without the rest. Raises DamagedCheckpointError for what is not a checkpoint."""
    with _opened(path, "numpy") as (_, metadata):
        return CheckpointHeader(*_header(metadata))


@dataclass(frozen=True)
class Checkpoint(CheckpointHeader):
    """The state of a run after `step` steps, by name."""

    tensors: "Mapping[str, Tensor]"


def save(checkpoints: Mapping[Path, Checkpoint], after_each: Callable[[], None] = lambda: None) -> None:
    """Writes checkpoints into their cells' folders, all or none of them; the last ones become the ones before.

    after_each: is called when one has been written, as many large ones may take long.
    """
    import safetensors.torch

    with atomic_writes(before_replace=_keep_previous) as write:
        for folder, state in checkpoints.items():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            metadata = {"step": str(state.step), "elapsed": repr(state.elapsed), "fingerprint": state.fingerprint}
            metadata["digest"] = _digest(tensors, metadata)
            with write(folder / CHECKPOINT) as file:
                file.write(safetensors.torch.save(tensors, metadata))
            after_each()


def _keep_previous(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.replace(path.with_name(PREVIOUS))


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises DamagedCheckpointError for a truncated or altered file."""
    with _opened(path, "pt") as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.pop("digest", None) != _digest(tensors, metadata):
            raise DamagedCheckpointError("its digest does not match")
        return Checkpoint(*_header(metadata), tensors)


def _digest(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints that one cell's folder has for one run, that of `fingerprint`.

    Those of another run, and damaged ones, are left aside, which is told on stderr.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._paths: dict[int, Path] = {}
        problems = []
        for path in filter(Path.exists, (folder / CHECKPOINT, folder / PREVIOUS)):
            # All of the file is read once it is known to be wanted.
            try:
                header = read_header(path)
            except DamagedCheckpointError as error:
                problems.append(f"{path} is damaged ({error})")
                continue
            if header.fingerprint == fingerprint:
                self._paths[header.step] = path
            else:
                # What comes after the slash, one run of a cell may have different from the next.
                same = header.fingerprint.partition("/")[0] == fingerprint.partition("/")[0]
                differs = "device or precision" if same else "config, corpus or version"
                problems.append(f"{path} is of another {differs}")
        for problem in problems:
            self._tell(problem)

    def _tell(self, what: str) -> None:
        left = max(self.steps, default=0)
        print(f"{what}: going on from step {left}" if left else f"{what}: starting from step 0", file=sys.stderr)

    @property
    def steps(self) -> list[int]:
        """The steps that there is a checkpoint of, the latest first."""
        return sorted(self._paths, reverse=True)

    def load(self, step: int) -> Checkpoint | None:
        """One of `steps`; None, and it is no longer one of them, if the file turns out to be damaged."""
        path = self._paths[step]
        try:
            return load(path)
        except DamagedCheckpointError as error:
            del self._paths[step]
            self._tell(f"{path} is damaged ({error})")
            return None

    def go_on_from(self, step: int) -> None:
        """Makes one of `steps` the newest: what is saved next must not put it out."""
        path = self._paths[step]
        if path.name != CHECKPOINT:
            path.replace(self._folder / CHECKPOINT)


def clear(folder: Path) -> None:
    """Removes a cell's checkpoints, and what a killed process left of one."""
    remove_leftovers(folder / CHECKPOINT)
    for name in (CHECKPOINT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def common_steps(available: Sequence[Sequence[int]]) -> list[int]:
    """The step that each cell of a stack goes on from, by the steps that it has checkpoints of.

    A cell goes on from its latest, but steps back to its one before where that is another cell's latest: the two
    were written in one go that a kill cut short, and cells trained together are to go on together.
    """
    latest = [max(steps, default=0) for steps in available]
    return [min((step for step in steps if step in latest), default=0) for steps in available]


def load_together(available: Sequence[Checkpoints]) -> list[Checkpoint | None]:
    """The checkpoint that each cell of a stack goes on from, now its newest; None where it begins at step 0."""
    while True:
        steps = common_steps([of_cell.steps for of_cell in available])
        loaded = [of_cell.load(step) if step else None for of_cell, step in zip(available, steps, strict=True)]
        # One that is damaged leaves another to go on from.
        if all(saved or not step for step, saved in zip(steps, loaded, strict=True)):
            break
    for of_cell, saved in zip(available, loaded, strict=True):
        if saved:
            of_cell.go_on_from(saved.step)
    return loaded
