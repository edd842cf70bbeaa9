"""The cost of checkpoints and heartbeats relative to training time, at the default sizes.

python benchmarks/checkpoints.py [--widths 32 64 128 256 512] [--rounds 7] [--device cuda] [--folder FOLDER]

For each width, a stack like the pipeline's alternates between blocks of steps, writing all of its checkpoints, and
writing all of its heartbeats, synced to disk as in a run. `overhead_percent` is the time of the writes as a share of
training time, if they happen as often as in a run: a checkpoint every `execution.checkpoint_seconds` of config.yaml and
a heartbeat every ten seconds. Choose a --folder on the file system that will hold the results.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import PROVENANCE, ROOT, announced, machine_row, out_path, parser, seconds_of
from variants import CURVE, VOCABULARY, Variant, default_variant, read_request, trainer_of

from mup_moe.config.document import read_document
from mup_moe.config.load import validate
from mup_moe.files import write_csv
from mup_moe.model.inventory import ModelShape, model_size
from mup_moe.ops import checkpoint, heartbeat
from mup_moe.ops.checkpoint import CHECKPOINT, Checkpoint
from mup_moe.ops.device import keep_freed_pages
from mup_moe.ops.heartbeat import Heartbeat
from mup_moe.training.memory import replicas_on
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import BLOCK_STEPS, Trainer

COLUMNS = (
    *("width", "replicas", "parameters", "step_ms", "checkpoint_mb", "checkpoint_ms", "heartbeat_ms"),
    *("checkpoint_seconds", "heartbeat_seconds", "overhead_percent", "goal_percent"),
    *PROVENANCE,
)
GOAL_PERCENT = 3.0


def stack_of(base: TrainingRequest, width: int, device: str) -> Variant:
    """Returns a stack like the one that the pipeline trains."""
    alone = default_variant(base, device, width=width)
    size = model_size(ModelShape.of(alone.request(base).cell, base.model, VOCABULARY), base.model)
    return replace(alone, replicas=replicas_on(device, "auto", size.parameters) or CURVE)


def save(trainer: Trainer, folders: list[Path]) -> None:
    """Writes all checkpoints of the stack, as `mup_moe train` does."""
    states = trainer.states()
    checkpoint.save({folders[replica]: Checkpoint(trainer.step, 0.0, "", state) for replica, state in states.items()})


def beat(trainer: Trainer, folders: list[Path]) -> None:
    """Writes all heartbeats of the stack, as `mup_moe train` does."""
    sign = Heartbeat.now(trainer.step, trainer.settings.steps, len(folders), 1.0)
    for folder in folders:
        sign.write(folder)


def row_of(trainer: Trainer, folder: Path, rounds: int, checkpoint_seconds: float) -> list[Any]:
    """Measures a stack. Returns the values of `COLUMNS` from `replicas` on, without the provenance."""
    folders = [folder / str(replica) for replica in range(len(trainer.requests))]
    works: list[Callable[[], Any]] = [
        lambda: trainer.run(trainer.step + BLOCK_STEPS),
        lambda: save(trainer, folders),
        lambda: beat(trainer, folders),
    ]
    for work in works:
        work()
    turns = [[seconds_of(work, trainer.device.type) for work in works] for _ in range(rounds)]
    block, saving, beating = map(statistics.median, zip(*turns, strict=True))
    saved = sum((path / CHECKPOINT).stat().st_size for path in folders)
    overhead = saving / checkpoint_seconds + beating / heartbeat.SECONDS
    return [
        *(len(folders), trainer.size.parameters, round(1e3 * block / BLOCK_STEPS, 2), round(saved / 1e6, 2)),
        *(round(1e3 * saving, 2), round(1e3 * beating, 3), checkpoint_seconds, heartbeat.SECONDS),
        *(round(100 * overhead, 3), GOAL_PERCENT),
    ]


def main() -> None:
    """Measures each width and writes a row for it."""
    options = parser(__doc__, "checkpoints")
    options.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--folder", type=Path, help="folder for the checkpoints")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    base = read_request(arguments.request)
    seconds = validate(read_document(ROOT / "config.yaml")).execution.checkpoint_seconds
    machine = machine_row(arguments.device, arguments.threads)
    rows = []
    for width in arguments.widths:
        with announced(f"width {width}"), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            trainer = trainer_of(stack_of(base, width, arguments.device), base)
            rows.append([width, *row_of(trainer, Path(folder), arguments.rounds, seconds), *machine])
    write_csv(out_path(arguments, "checkpoints"), COLUMNS, rows)


if __name__ == "__main__":
    main()
