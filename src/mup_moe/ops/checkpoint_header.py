"""What a checkpoint says of itself, read without its tensors; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


class DamagedCheckpointError(Exception):
    """The file is not what `checkpoint.save` wrote."""


@dataclass(frozen=True)
class CheckpointHeader:
    """After how many steps a checkpoint was written, of which run, and after how many seconds of training."""

    step: int
    elapsed: float
    fingerprint: str

    def as_metadata(self) -> dict[str, str]:
        """As safetensors keeps it; `parse_header` reads it back."""
        return {"step": str(self.step), "elapsed": repr(self.elapsed), "fingerprint": self.fingerprint}


def parse_header(metadata: Mapping[str, str]) -> CheckpointHeader:
    """Reads `as_metadata`. Raises DamagedCheckpointError for anything else."""
    try:
        return CheckpointHeader(int(metadata["step"]), float(metadata["elapsed"]), metadata["fingerprint"])
    except (KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"its header: {error!r}") from error


def read_header(path: Path) -> CheckpointHeader:
    """The header of a file, without the rest. Raises DamagedCheckpointError for what is no checkpoint."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise DamagedCheckpointError(str(error)) from error
    return parse_header(metadata)
