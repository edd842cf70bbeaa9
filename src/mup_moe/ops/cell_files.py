"""What a run of a cell leaves in the cell's folder, and whose it is."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mup_moe import provenance
from mup_moe.files import remove_leftovers
from mup_moe.model.metrics import METRICS
from mup_moe.ops import checkpoint, heartbeat
from mup_moe.ops.checkpoint_header import CHECKPOINT
from mup_moe.ops.result import Result
from mup_moe.training.code import code_digest
from mup_moe.training.device import precision_on
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Outcome, Trainer, learning_rate


class CellFiles:
    """A cell's folder: where its result and its checkpoints are, and whose they have to be.

    digests: of all that decides the result, as summary.json has them.
    """

    def __init__(self, request: TrainingRequest, tokens_digest: str, out: Path) -> None:
        self.request = request
        self.folder = out / request.cell.id
        self.digests = {"request": request.digest, "tokens_digest": tokens_digest, "code": code_digest()}
        self.digests["fingerprint"] = request.fingerprint(tokens_digest, self.digests["code"])
        self.result = Result(self.folder)

    def publish(self) -> bool:
        """Shows the result to everybody, if there is one; clears away what a killed process left."""
        heartbeat.clear(self.folder)
        remove_leftovers(self.folder / CHECKPOINT, *self.result.files)
        if self.result.is_of(self.digests["fingerprint"]):
            self.result.publish()
            checkpoint.clear(self.folder)
            return True
        return False

    def owner(self, device: torch.device) -> str:
        """Whose checkpoints this run can go on from."""
        # Rounding differs between devices and precisions: what one has begun no other goes on with.
        return f"{self.digests['fingerprint']}/{device.type}/{precision_on(device, self.request.training)}"

    def clear(self) -> None:
        """Takes away what only a cell that has no result needs."""
        checkpoint.clear(self.folder)
        heartbeat.clear(self.folder)

    def tables(self, trainer: Trainer, outcome: Outcome, seconds: float) -> tuple[list[list[Any]], dict[str, Any]]:
        """The rows of history.csv, its header first, and the content of summary.json."""
        steps = len(outcome.history_TM)
        # float32 in nine digits reads back exactly.
        rows: list[list[Any]] = [["step", "learning_rate", *METRICS]]
        for step, metrics in enumerate(outcome.history_TM.tolist()):
            rows.append([step, learning_rate(self.request, step), *(f"{value:.9g}" for value in metrics)])
        tokens = steps * trainer.tokens_per_step
        gpu = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
        return rows, {
            "id": self.request.cell.id,
            "cell": asdict(self.request.cell),
            "status": outcome.status,
            "train_loss": outcome.train_loss,
            "valid_loss": outcome.valid_loss,
            "steps": steps,
            "tokens": tokens,
            "flops": tokens * trainer.size.flops_per_token,
            "parameters": trainer.size.parameters,
            "active_parameters": trainer.size.active_parameters,
            "wall_seconds": round(seconds, 3),
            "device": trainer.device.type,
            "precision": trainer.precision,
            "step": trainer.step_mode,
            "replicas": len(trainer.requests),
            **self.digests,
            "settings": {
                "model": asdict(self.request.model),
                "training": asdict(self.request.training),
                "parametrization": self.request.parametrization.as_row(),
            },
            "machine": provenance.machine() | {"gpu": gpu, "threads": torch.get_num_threads()},
            "versions": provenance.versions("numpy", "safetensors") | {"torch": str(torch.__version__)},
        }
