"""Copies results, with their provenance, to a folder tracked by git: the whole paper, or some figures and probes."""

import argparse
import gzip
import json
import shutil
import subprocess
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mup_moe.analysis.runs import read_runs
from mup_moe.analysis.verdict import Test, all_tests
from mup_moe.config.given import Layers, read_given
from mup_moe.config.kinds import KINDS
from mup_moe.config.load import preset_files
from mup_moe.config.settings import RESULT_NAME
from mup_moe.files import UserError, csv_text, make_folder, read_json, write_json, write_text
from mup_moe.ops.cell_folder import read_result
from mup_moe.options import add_sweep_arguments, read_layers
from mup_moe.sweep import Sweep, one_of

LISTING = "paper"  # the file that lists all results of the workflow
# Without the HTML pages, which docs/report.py makes from these: each page contains a library.
TABLES = {".csv", ".md", ".tex"}
SUFFIXES = TABLES | {".pdf", ".png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("name", help="the name of the record, such as that of the preset")
    add_sweep_arguments(parser)
    help_probes = "probes to record along with --figures; without --figures, all probes are recorded"
    help_claims = "also record the claims; --figures and --probes must name everything that they rest on"
    parser.add_argument("--claims", action="store_true", help=help_claims)
    help_tables = "record only the tables, not the drawings"
    parser.add_argument("--tables", action="store_true", help=help_tables)
    parser.add_argument("--probes", nargs="+", action="extend", default=[], metavar="NAME", help=help_probes)


def run(arguments: argparse.Namespace) -> None:
    """Copies the results to RESULTS/recorded/NAME and adds a provenance.json. Raises UserError."""
    results: Path = arguments.results
    if not RESULT_NAME.fullmatch(arguments.name):
        raise UserError(
            f"the name {arguments.name!r} must consist of lower-case letters and digits, in words joined by '-' or '_'"
        )
    layers = read_layers(arguments)
    sweep = Sweep(layers.config, results)
    if arguments.claims and arguments.figures is None:
        raise UserError("--claims needs --figures: the record of a whole sweep always includes its claims")
    if arguments.figures is None and not (results / LISTING).exists():
        raise UserError(f"{results / LISTING} does not exist: make it first with `snakemake results/{LISTING}`")
    tables = [results / "runs.csv"] if arguments.figures is None else map(sweep.runs, sweep.chosen(arguments.figures))
    cells = dict.fromkeys(name for table in tables for name in read_runs(table).index)
    summaries = {name: read_result(results / "cells" / name) for name in cells}
    alone = arguments.figures is not None
    probes = (
        [one_of(name, sweep.config.probes, "probes") for name in arguments.probes] if alone else sweep.config.probes
    )
    _check_config(sweep, summaries, probes)
    if arguments.claims:
        _check_claims(sweep, {*sweep.chosen(arguments.figures), *probes})
    made_by = provenance_of(results, list(summaries.values()))
    folder = results / "recorded" / arguments.name
    # The record moves into place once it is complete; a hidden folder is left over from an interrupted attempt.
    made, before = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    if before.exists() and not folder.exists():
        before.replace(folder)
    for left in (made, before):
        shutil.rmtree(left, ignore_errors=True)
    make_folder(made)
    try:
        sources = [path for name in sweep.chosen(arguments.figures) for path in _of_figure(sweep, name, alone)]
        sources += [path for name in probes for path in _of_probe(sweep, name)]
        shown, suffixes = [*(arguments.figures or ()), *probes], TABLES if arguments.tables else SUFFIXES
        sources += [path for name in shown for path in _shown(results, name, suffixes)] if alone else []
        sources += [path for name in (shown if alone else sweep.config.comparisons) for path in _of_kind(sweep, name)]
        sources += _of_claims(results, suffixes) if arguments.claims else []
        for source in sources if alone else [*sources, *_of_paper(results, suffixes)]:
            target = made / source.relative_to(results)
            make_folder(target.parent)
            if source.name == "values.csv":  # several megabytes, which compress to a quarter
                target.with_suffix(".csv.gz").write_bytes(gzip.compress(source.read_bytes(), mtime=0))
            else:
                shutil.copy2(source, target)
        write_json(made / "provenance.json", made_by | {"config": _keep_config(layers, made)})
        if folder.exists():
            folder.replace(before)
        made.replace(folder)
    except OSError as error:
        raise UserError(f"a copy failed ({error}) and {folder} is unchanged: fix the cause and record again") from error
    shutil.rmtree(before, ignore_errors=True)


def _check_config(sweep: Sweep, summaries: Mapping[str, Any], probes: Iterable[str]) -> None:
    """Raises UserError if a cell was trained, or a probe measured, with another config."""
    digests = {cell.id: sweep.request(cell).digest for cells in sweep.figures.values() for cell in cells}
    other = [name for name, summary in summaries.items() if summary["request"] != digests.get(name)]
    if other:
        raise UserError(
            f"{len(other)} of {len(summaries)} cells were trained with another config, such as {other[0]}: give the"
            " config that they were trained with, including its --preset and all of its --config"
        )
    for name in probes:
        measured = read_json(sweep.probe_values(name).with_suffix(".json"))
        if measured["requests"] != {c.id: sweep.request(c).digest for c in sweep.config.probes[name].cells()}:
            raise UserError(
                f"the probe {name} was measured with another config: give the config that it was measured with"
            )


def _check_claims(sweep: Sweep, kept: Container[str]) -> None:
    """Raises UserError if the claims rest on unrecorded results, or do not follow from this config and these runs."""
    claims, results = sweep.config.claims, sweep.results
    slopes = [slope.probe for claim in claims.table.values() for slope in claim.slopes]
    for name in [*claims.figures, *slopes]:
        if name not in kept:
            raise UserError(f"the claims rest on {name}, which is not recorded: add it to --figures or --probes")
    tests = [test for of_claim in all_tests(sweep.config, results).values() for test in of_claim]
    path = results / "claims/tests.csv"
    if not path.exists() or path.read_text(encoding="utf-8") != csv_text(Test._fields, tests):
        raise UserError(f"{path} does not match this config and these runs: remake results/claims.csv")


def _keep_config(layers: Layers, folder: Path) -> list[str]:
    """Copies the layers of a config to a folder; returns the names of the files there, the lowest layer first."""
    names: list[str] = []
    for path in [layers.base, *preset_files(layers.base.parent / "presets", layers.preset), *layers.files]:
        # A user's file may have the same name as one of ours.
        names.append(path.name if path.name not in names else f"{len(names)}-{path.name}")
        shutil.copy2(path, folder / names[-1])
    if layers.entries:
        names.append("command-line.yaml")
        write_text(folder / names[-1], yaml.safe_dump(read_given([], layers.entries)))
    return names


def _of_figure(sweep: Sweep, name: str, alone: bool) -> Iterator[Path]:
    """Yields the tables of one figure; alone: also those that the whole paper combines over all figures."""
    yield from _of_kind(sweep, name)
    yield from [sweep.results / name / "reference.csv"] if sweep.config.figures[name].reference else []
    if alone:
        yield from (sweep.runs(name), sweep.optima(name))


def _of_kind(sweep: Sweep, name: str) -> Iterator[Path]:
    """Yields the files of the table that is specific to a figure's kind."""
    kind = sweep.config.kinds[name]
    suffixes = ("csv", "md") if KINDS[kind].table else ()
    yield from (sweep.results / name / f"{kind}.{suffix}" for suffix in suffixes)


def _of_claims(results: Path, suffixes: Container[str]) -> list[Path]:
    shown = (path for name in ("claims", "verdicts") for path in _shown(results, name, suffixes))
    return [*shown, results / "claims/tests.csv"]


def _shown(results: Path, name: str, suffixes: Container[str]) -> Iterator[Path]:
    return (path for path in sorted(results.glob(f"{name}.*")) if path.suffix in suffixes)


def _of_probe(sweep: Sweep, name: str) -> Iterator[Path]:
    yield from (sweep.probe_values(name).with_suffix(f".{kind}") for kind in ("csv", "json"))


def _of_paper(results: Path, suffixes: Container[str]) -> Iterator[Path]:
    for name in (results / LISTING).read_text(encoding="utf-8").split():
        yield from _shown(results, Path(name).stem, suffixes)
    yield results / "claims/tests.csv"


def provenance_of(results: Path, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the provenance of the cells: the commit, and every distinct machine, set of versions, code and tokens."""
    corpora = sorted(results.glob("data/*/manifest.json"))
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "workflow", "presets", "config.yaml")),
        "cells": len(summaries),
        "wall_seconds": round(sum(summary["wall_seconds"] for summary in summaries), 1),
        **{
            key: _distinct(summary[key] for summary in summaries)
            for key in ("machine", "versions", "version", "code", "tokens_digest", "precision", "device")
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
