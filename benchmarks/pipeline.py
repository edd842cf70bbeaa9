"""Overhead of the pipeline: the wall time of a figure compared with its pure training time divided by the cores.

python benchmarks/pipeline.py [--cores 2] [--widths 32 64 128] [--rates 2^-8 ... 2^-2] [--steps 300]
                              [--out benchmarks/pipeline.csv]

Runs `snakemake results/figure1.pdf`, as `make figure1` does, in a copy of the checkout, with 63 cells of 307,200
tokens: SP, simpleP and muP, three widths, seven learning rates. The training part is the wall time without tokenizing;
`overhead` is how much longer it took than the cells' own training seconds, spread evenly over the cores. Both have a
goal in the next column. The same figure is then made in float32, with each cell in its own process and on the same
tokens, to compare the optima: how many curves have their lowest loss at the same learning rate, and how far apart the
fitted optima are (octaves).
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from common import PROVENANCE, ROOT, machine_row, seconds_of

from mup_moe.analysis.runs import read_table
from mup_moe.files import read_json, write_csv

COLUMNS = (
    *("figure", "cells", "jobs", "steps", "tokens", "cores", "device", "precision", "step", "replicas"),
    *("wall_seconds", "tokenize_seconds", "training_part_seconds", "goal_seconds"),
    *("training_seconds", "training_seconds_over_cores", "overhead", "goal_overhead"),
    *("curves", "same_best_rate", "median_shift", "largest_shift", "float32_training_part_seconds"),
    *PROVENANCE,
)
GOAL_SECONDS, GOAL_OVERHEAD = 240, 0.10
FIGURE = "figure1"
# Not copied: results, environments and caches.
_LEFT_OUT = (".git", ".venv*", ".snakemake", "results", "tests", "__pycache__", ".*_cache")


def overlay(arguments: argparse.Namespace, alone: bool = False) -> dict[str, Any]:
    """Returns the overlay on config.yaml. alone: train in float32 with one process per cell."""
    axes = {
        "parametrization": ["sp", "simplep", "mup"],
        "width": arguments.widths,
        "learning_rate": arguments.rates,
        "seed": [0],
    }
    training: dict[str, Any] = {"steps": arguments.steps, "final_loss_steps": min(30, arguments.steps)}
    execution: dict[str, Any] = {"device": arguments.device}
    if arguments.step is not None:
        execution["step"] = arguments.step
    if alone:
        training["precision"] = "float32"
        execution["lockstep"] = []
    corpus = {"max_bytes": arguments.max_bytes} if arguments.max_bytes is not None else {}
    return {
        "figures": {FIGURE: {"axes": axes}},
        "setups": {"small": {"training": training}},
        "corpora": {"python": corpus},
        "execution": execution,
    }


def run_figure(folder: Path, config: dict[str, Any], cores: int) -> float:
    """Returns the seconds that Snakemake takes to make the figure."""
    path = folder / "benchmark.json"  # JSON is YAML
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", f"results/{FIGURE}.pdf", "--cores", str(cores)]

    def work() -> None:
        done = subprocess.run(
            [*command, "--configfile", path],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")

    return seconds_of(work)


def job_seconds(folder: Path) -> float:
    """Returns the total seconds of the jobs whose benchmark files are in a folder."""
    total = 0.0
    for path in folder.rglob("*.tsv"):
        with path.open(encoding="utf-8") as file:
            total += sum(float(row["s"]) for row in csv.DictReader(file, delimiter="\t"))
    return total


def optima_of(results: Path) -> pd.DataFrame:
    """Returns a row per curve, in a fixed order: the learning rate of the lowest loss, and the fitted one as log2."""
    curve = ["parametrization", "width"]
    runs = read_table(results / "runs.csv", {"width": int, "learning_rate": float, "train_loss": float})
    lowest = runs.loc[runs.groupby(curve)["train_loss"].idxmin()].set_index(curve)["learning_rate"]
    optima = read_table(results / "optima.csv", {"value": int, "log2_lr": float})
    fitted = optima.rename(columns={"value": "width"}).set_index(curve)["log2_lr"]
    return pd.DataFrame({"lowest": lowest, "fitted": fitted}).sort_index()


def agreement(found: pd.DataFrame, expected: pd.DataFrame) -> list[Any]:
    """Returns the columns that compare two sets of optima."""
    shift = (found["fitted"] - expected["fitted"]).abs()
    same = int((found["lowest"] == expected["lowest"]).sum())
    return [len(found), same, round(shift.median(), 3), round(shift.max(), 3)]


def row_of(results: Path, wall: float, cores: int, threads: int) -> list[Any]:
    """Returns the row without the comparison and the provenance."""
    summaries = [read_json(path) for path in results.glob("cells/*/summary.json")]
    first = summaries[0]
    tokenize = job_seconds(results / "benchmarks" / "tokenize")
    training = sum(summary["wall_seconds"] for summary in summaries)
    part, over_cores = wall - tokenize, training / (cores // threads)
    return [
        *(FIGURE, len(summaries), len(list(results.glob("benchmarks/train/*.tsv"))), first["steps"]),
        *(sum(summary["tokens"] for summary in summaries), cores, first["device"], first["precision"]),
        *(first["step"], max(summary["replicas"] for summary in summaries)),
        *(round(wall, 1), round(tokenize, 1), round(part, 1), GOAL_SECONDS),
        *(round(training, 1), round(over_cores, 1), round(part / over_cores - 1, 3), GOAL_OVERHEAD),
    ]


def main() -> None:
    """Makes the figure with its defaults and in float32, and writes a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--rates", nargs="+", default=[f"2^-{power}" for power in range(8, 1, -1)])
    parser.add_argument("--steps", type=int, default=300, help="training steps of each cell")
    parser.add_argument("--step", help="step mode, instead of that of config.yaml")
    parser.add_argument("--max-bytes", type=int, help="bytes of text, instead of those of config.yaml")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        wall = run_figure(copy, overlay(arguments), arguments.cores)
        row = row_of(copy / "results", wall, arguments.cores, threads=1)
        found = optima_of(copy / "results")
        # Keep the tokens: the corpus is made of installed packages, and other versions would change it.
        shutil.rmtree(copy / "results" / "cells")
        alone = run_figure(copy, overlay(arguments, alone=True), arguments.cores)
        row += [*agreement(found, optima_of(copy / "results")), round(alone, 1)]
        row += machine_row(arguments.device, threads=1)
    folder = ROOT / "benchmarks" / ("gpu" if arguments.device == "cuda" else "")
    write_csv(arguments.out or folder / "pipeline.csv", COLUMNS, [row])
    named = dict(zip(COLUMNS, row, strict=True))
    print(
        f"{named['cells']} cells in {named['jobs']} jobs: {named['wall_seconds']:.0f} s,"
        f" {named['tokenize_seconds']:.0f} s of that tokenizing; the rest took {named['overhead']:.0%} longer than"
        f" {named['training_seconds']:.0f} s of training spread over {named['cores']} cores"
    )
    print(
        f"{named['same_best_rate']} of {named['curves']} curves have the same best learning rate as float32 cells"
        f" trained one by one; the fitted optima are at most {named['largest_shift']} octaves apart"
    )


if __name__ == "__main__":
    main()
