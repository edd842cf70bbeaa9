"""What a checkpoint says of itself, read without its tensors; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
        """As safetensors keeps it; `parse` reads it back."""
        return {"step": str(self.step), "elapsed": repr(self.elapsed), "fingerprint": self.fingerprint}

    @classmethod
    def parse(cls, metadata: Mapping[str, str]) -> Self:
        """Raises DamagedCheckpointError for what `as_metadata` did not make."""
        try:
            return cls(int(metadata["step"]), float(metadata["elapsed"]), metadata["fingerprint"])
        except (KeyError, ValueError) as error:
            raise DamagedCheckpointError(f"its header: {error!r}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a file, all of which is not read. Raises DamagedCheckpointError for what is no checkpoint."""
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise DamagedCheckpointError(str(error)) from error
        return cls.parse(metadata)
