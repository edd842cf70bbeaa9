"""Checkpoints: whole or absent, verified by digest, loaded without executing code, and kept in two generations.

Only functions that save or load tensors import torch, so `status` reads headers without it.
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
    """The file differs from what `checkpoint.save` wrote."""


@dataclass(frozen=True)
class CheckpointHeader:
    """The steps and seconds of training before a checkpoint was written, and the fingerprint of its run."""

    step: int
    elapsed: float
    fingerprint: str


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yields the file and its header's metadata. Raises DamagedCheckpointError if either is invalid."""
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            yield file, file.metadata() or {}
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise DamagedCheckpointError(f"{type(error).__name__}: {error}") from error


def _header(metadata: Mapping[str, str]) -> tuple[int, float, str]:
    return int(metadata["step"]), float(metadata["elapsed"]), metadata["fingerprint"]


def read_header(path: Path) -> CheckpointHeader:
    """Reads only the header of a file. Raises DamagedCheckpointError if the file is not a checkpoint."""
    with _opened(path, "numpy") as (_, metadata):
        return CheckpointHeader(*_header(metadata))


@dataclass(frozen=True)
class Checkpoint(CheckpointHeader):
    """The state of a run after `step` steps: tensors by name."""

    tensors: "Mapping[str, Tensor]"


def save(checkpoints: Mapping[Path, Checkpoint], after_each: Callable[[], None] = lambda: None) -> None:
    """Writes checkpoints into their cells' folders, all or none of them; the latest ones become the previous ones.

    after_each: called after each file, since many large ones may take long.
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
    """Loads a checkpoint. Raises DamagedCheckpointError if the file is truncated or altered."""
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
    """The checkpoints in one cell's folder that belong to the run with this `fingerprint`.

    Ignores those of other runs and damaged ones, and reports them on stderr.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._paths: dict[int, Path] = {}
        problems = []
        for path in filter(Path.exists, (folder / CHECKPOINT, folder / PREVIOUS)):
            # The header is enough here; `load` reads the whole file.
            try:
                header = read_header(path)
            except DamagedCheckpointError as error:
                problems.append(f"{path} is damaged ({error})")
                continue
            if header.fingerprint == fingerprint:
                self._paths[header.step] = path
            else:
                # The part after the slash may differ between runs of the same cell.
                same = header.fingerprint.partition("/")[0] == fingerprint.partition("/")[0]
                differs = "device or precision" if same else "config, corpus or version"
                problems.append(f"{path} is from another {differs}")
        for problem in problems:
            self._report(problem)

    def _report(self, problem: str) -> None:
        step = max(self.steps, default=0)
        print(f"{problem}: {'resuming' if step else 'starting'} from step {step}", file=sys.stderr)

    @property
    def steps(self) -> list[int]:
        """The steps of the available checkpoints, the latest first."""
        return sorted(self._paths, reverse=True)

    def load(self, step: int) -> Checkpoint | None:
        """Loads the checkpoint of one of `steps`; if its file is damaged, removes the step and returns None."""
        path = self._paths[step]
        try:
            return load(path)
        except DamagedCheckpointError as error:
            del self._paths[step]
            self._report(f"{path} is damaged ({error})")
            return None

    def resume_from(self, step: int) -> None:
        """Makes the checkpoint of one of `steps` the newest, so that the next save does not overwrite it."""
        path = self._paths[step]
        if path.name != CHECKPOINT:
            path.replace(self._folder / CHECKPOINT)


def clear(folder: Path) -> None:
    """Deletes a cell's checkpoints, including a partial one left by a killed process."""
    remove_leftovers(folder / CHECKPOINT)
    for name in (CHECKPOINT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def common_steps(available: Sequence[Sequence[int]]) -> list[int]:
    """Returns the step from which each cell of a stack resumes, given the steps of its checkpoints.

    A cell resumes from its latest checkpoint, or from its previous one if that step is another cell's latest: then a
    kill interrupted a save of the whole stack, and cells that were trained together should resume together.
    """
    latest = [max(steps, default=0) for steps in available]
    return [min((step for step in steps if step in latest), default=0) for steps in available]


def load_together(available: Sequence[Checkpoints]) -> list[Checkpoint | None]:
    """Loads the checkpoint from which each cell of a stack resumes and makes it the newest; None: from step 0."""
    while True:
        steps = common_steps([of_cell.steps for of_cell in available])
        loaded = [of_cell.load(step) if step else None for of_cell, step in zip(available, steps, strict=True)]
        # After a damaged one, try again with the checkpoints that are left.
        if all(saved or not step for step, saved in zip(steps, loaded, strict=True)):
            break
    for of_cell, saved in zip(available, loaded, strict=True):
        if saved:
            of_cell.resume_from(saved.step)
    return loaded
