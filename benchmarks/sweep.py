"""Time of a curve of nine learning rates: one process per cell, one process for all cells, and one stack.

python benchmarks/sweep.py [--width 64] [--cells 9] [--steps 300] [--rounds 1] [--step auto]
                           [--device cuda] [--request request.json]

All three run `mup_moe train`, from the start of Python to the last result on disk, on existing tokens: "solo" is one
process per cell, one after the other; "process" is one process with one cell after the other; "stacked" is one
process with the cells in lockstep, as many at once as `execution.replicas: auto` allows. They take turns, and
`ratio_to_solo` is the median over the rounds of how many times as fast as solo each was. Training seconds are from
the cells' summaries, so the rest of the wall time is starting and files. If steps are compiled, nothing is cached and
the training seconds include compilation.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import PROVENANCE, ROOT, machine_row, out_path, parser, seconds_of
from variants import VOCABULARY, default_variant, read_request, token_stream

from mup_moe.config.cell import LearningRate
from mup_moe.config.settings import STEPS
from mup_moe.data.corpus import SPLITS
from mup_moe.data.tokens import MANIFEST
from mup_moe.files import read_json, write_csv, write_json
from mup_moe.ops.offsite.job_list import ListedJob, write_jobs
from mup_moe.training.device import precision_on
from mup_moe.training.request import TrainingRequest

COLUMNS = (
    *("mode", "architecture", "width", "cells", "steps", "precision", "step", "wall_seconds"),
    *("training_seconds", "tokens_per_second", "ratio_to_solo"),
    *PROVENANCE,
)
SOLO, PROCESS, STACKED = MODES = ("solo", "process", "stacked")


def curve(base: TrainingRequest, width: int, cells: int, steps: int) -> list[TrainingRequest]:
    """Returns the cells of a curve, at learning rates that do not diverge, because diverged cells end early."""
    training = replace(base.training, steps=steps, final_loss_steps=min(base.training.final_loss_steps, steps))
    return [
        replace(
            base,
            cell=replace(base.cell, width=width, learning_rate=LearningRate(2 ** (index / 2 - 10))),
            training=training,
        )
        for index in range(cells)
    ]


def write_tokens(folder: Path) -> None:
    """Writes a corpus in the form that `mup_moe tokenize` writes."""
    tokens = token_stream().astype("<u2").tobytes()
    for split in SPLITS:
        (folder / f"{split}.bin").write_bytes(tokens)
    split = {"tokens": len(tokens) // 2, "tokens_sha256": hashlib.sha256(tokens).hexdigest()}
    manifest = {"vocabulary": VOCABULARY, "end_of_text": 0, "dtype": "uint16", "splits": dict.fromkeys(SPLITS, split)}
    write_json(folder / MANIFEST, manifest)


def train(requests: Sequence[TrainingRequest], tokens: Path, out: Path, options: Sequence[str], cache: str) -> None:
    """Runs one process of `mup_moe train`."""
    if not (out / "data").exists():
        (out / "data").symlink_to(tokens.parent)
    write_jobs(out / "jobs.jsonl", [ListedJob("job", "figure1", tokens.name, "", tuple(requests))])
    done = subprocess.run(
        [sys.executable, "-m", "mup_moe", "train", "--requests", out / "jobs.jsonl", "--results", out, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TORCHINDUCTOR_CACHE_DIR": cache},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"mup_moe train failed:\n{done.stderr}")


def run(mode: str, requests: Sequence[TrainingRequest], tokens: Path, options: Sequence[str]) -> tuple[float, float]:
    """Trains a whole curve in one of `MODES`. Returns its wall seconds and the total training seconds of its cells."""
    groups = [[request] for request in requests] if mode == SOLO else [list(requests)]
    replicas = "auto" if mode == STACKED else "1"
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as cache:

        def work() -> None:
            for group in groups:
                train(group, tokens, Path(out), [*options, "--replicas", replicas], cache)

        wall = seconds_of(work)
        summaries = (read_json(Path(out) / "cells" / request.cell.id / "summary.json") for request in requests)
        return wall, sum(summary["wall_seconds"] for summary in summaries)


def rows_of(
    requests: Sequence[TrainingRequest], times: dict[str, list[tuple[float, float]]], how: Sequence[str]
) -> Iterator[list[Any]]:
    """Yields a row for each mode, without the provenance."""
    cell, training = requests[0].cell, requests[0].training
    tokens = len(requests) * training.steps * training.batch_size * requests[0].model.sequence
    for mode, rounds in times.items():
        wall = statistics.median(seconds for seconds, _ in rounds)
        faster = statistics.median(solo / mine for (solo, _), (mine, _) in zip(times[SOLO], rounds, strict=True))
        yield [
            *(mode, cell.architecture, cell.width, len(requests), training.steps, *how, round(wall, 2)),
            round(statistics.median(seconds for _, seconds in rounds), 2),
            *(round(tokens / wall), round(faster, 3)),
        ]


def main() -> None:
    """Runs each mode `--rounds` times and writes a row for each."""
    options = parser(__doc__, "sweep")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--cells", type=int, default=9)
    options.add_argument("--steps", type=int, default=300, help="training steps of each cell")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--step", default="auto", choices=["auto", *STEPS])
    arguments = options.parse_args()
    base, device = read_request(arguments.request), arguments.device
    requests = curve(base, arguments.width, arguments.cells, arguments.steps)
    default = default_variant(requests[0], device, width=arguments.width)
    # A request may set its precision.
    precision = precision_on(torch.device(device), base.training)
    how = [precision, default.step if arguments.step == "auto" else arguments.step]
    train_options = ["--device", device, "--threads", str(arguments.threads), "--step", arguments.step]
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        for _ in range(arguments.rounds):
            for mode, rounds in times.items():
                rounds.append(run(mode, requests, Path(folder), train_options))
                print(f"{mode}: {rounds[-1][0]:.1f} s", file=sys.stderr, flush=True)
    rows = [row + machine_row(device, arguments.threads) for row in rows_of(requests, times, how)]
    write_csv(out_path(arguments, "sweep"), COLUMNS, rows)
    for row in rows:
        named = dict(zip(COLUMNS, row, strict=True))
        print(
            f"{named['mode']:8} {named['wall_seconds']:7.1f} s, {named['training_seconds']:.1f} s of that training,"
            f" {named['ratio_to_solo']:.2f}x solo"
        )


if __name__ == "__main__":
    main()
