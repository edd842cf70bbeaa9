"""Copies a figure's results to a folder that git keeps, with what made them.

python -m mup_moe record FIGURE
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

from mup_moe.files import UserError, make_folder, read_json, write_json

RESULTS = ("{figure}/runs.csv", "{figure}/optima.csv", "{figure}.pdf", "{figure}.png", "table1.csv", "table1.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `record`."""
    parser.add_argument("figure", help="the figure's name in the config")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the finished results")
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path("config.yaml")], help="the config that made them"
    )


def run(arguments: argparse.Namespace) -> None:
    """Copies the results to RESULTS/recorded/FIGURE and writes provenance.json beside them."""
    folder = arguments.results / "recorded" / arguments.figure
    sources = [arguments.results / name.format(figure=arguments.figure) for name in RESULTS]
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} does not exist: make results/{arguments.figure}.pdf first")
    made_by = provenance_of(arguments.results, pd.read_csv(sources[0])["cell"].tolist())
    make_folder(folder)
    for source in [*sources, *arguments.config]:
        shutil.copy2(source, folder / source.name)
    write_json(folder / "provenance.json", made_by)


def provenance_of(results: Path, cells: list[str]) -> dict[str, Any]:
    """What made the cells: the commit, and every distinct machine, set of versions, code and tokens."""
    summaries = [read_json(results / "cells" / cell / "summary.json") for cell in cells]
    corpora = sorted(results.glob("data/*/manifest.json"))
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "config.yaml")),
        "cells": len(cells),
        "wall_seconds": round(sum(summary["wall_seconds"] for summary in summaries), 1),
        **{
            key: _distinct(summary[key] for summary in summaries)
            for key in ("machine", "versions", "code", "tokens_digest", "precision", "device")
        },
        "seeds": sorted({summary["cell"]["seed"] for summary in summaries}),
        "corpora": {path.parent.name: read_json(path) for path in corpora},
    }


def _distinct(values: Any) -> list[Any]:
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)  # noqa: S603, S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
