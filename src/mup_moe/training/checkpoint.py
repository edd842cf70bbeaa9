"""Checkpoints: whole or absent, checked by digest, and loaded without executing code."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mup_moe.files import atomic_write


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps.

    fingerprint: of the run that wrote it; elapsed: seconds of training so far.
    """

    step: int
    elapsed: float
    fingerprint: str
    tensors: Mapping[str, Tensor]


class DamagedCheckpointError(Exception):
    """The file is not what `save` wrote."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {
        "step": str(checkpoint.step),
        "elapsed": repr(checkpoint.elapsed),
        "fingerprint": checkpoint.fingerprint,
    }
    metadata["digest"] = _digest(tensors, metadata)
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises DamagedCheckpointError for a truncated or altered file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.pop("digest") != _digest(tensors, metadata):
            raise DamagedCheckpointError("its digest does not match")
        return Checkpoint(int(metadata["step"]), float(metadata["elapsed"]), metadata["fingerprint"], tensors)
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise DamagedCheckpointError(str(error)) from error


def step_of(path: Path) -> int:
    """The step that a checkpoint says it is of, unchecked; 0 for a file that is not there or no checkpoint."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (safetensors.SafetensorError, KeyError, ValueError, OSError):
        return 0


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
