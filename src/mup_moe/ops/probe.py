"""Measures the models of a probe one by one: python -m mup_moe probe."""

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.data.tokens import Tokens
from mup_moe.files import claim_folder, write_csv, write_json, write_text
from mup_moe.ops.device import claim_device, keep_freed_pages
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import one_of
from mup_moe.training.probe import measure
from mup_moe.training.version import VERSION

Rows = list[list[Any]]  # one model's rows of (step, quantity, block, value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("probe", help="name of the probe in the config")
    add_config_arguments(parser)
    how = parser.add_argument_group("how to train (default: `execution` of the config)")
    how.add_argument("--device", choices=["auto", "cpu", "cuda"])
    how.add_argument("--threads", type=int, metavar="N")


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/PROBE/values.csv, one row per model, step, quantity and block. Raises UserError.

    Reuses the measurements that a killed run kept next to it.
    """
    sweep = read_sweep(arguments)
    name, execution = one_of(arguments.probe, sweep.config.probes, "probes"), sweep.config.execution
    probe, out = sweep.config.probes[name], sweep.probe_values(name)
    # The largest model comes last, because its memory is only freed when the process ends.
    requests = [sweep.request(cell) for cell in sweep.probe_cells(name)]
    of_model = ("parametrization", probe.over, "seed")
    model = attrgetter(*of_model)
    torch.set_num_threads(arguments.threads or execution.threads)
    keep_freed_pages(of_any_size=True)
    tokens = Tokens.open(sweep.tokens(sweep.probe_corpus(name)), verify=True)
    packages = sorted({package for request in requests for package in request.packages})
    rows: Rows = []
    with claim_folder(out.parent), claim_device(arguments.device or execution.device) as device:
        alike = {
            "tokens": tokens.digests,
            "version": VERSION,
            "code": provenance.code_digest(),
            "device": device.type,
            "machine": provenance.machine(),
            "versions": provenance.versions("numpy", *packages) | {"torch": str(torch.__version__)},
        }
        kept = _Kept(out.with_name("measured.jsonl"), alike | {"measure": probe.measure, "steps": list(probe.steps)})
        for request in tqdm(requests, unit="model", mininterval=5, ascii=True):
            if (found := kept.rows.get(request.digest)) is None:
                values = measure(request, probe.measure, probe.steps, tokens, device)
                found = [[step, *key, f"{value:.9g}"] for step, (key, value) in values]
                kept.add(request.digest, found)
            rows.extend([*model(request.cell), *row] for row in found)
        write_csv(out, [*of_model, "step", "quantity", "block", "value"], rows)
        write_json(out.with_suffix(".json"), {"requests": {r.cell.id: r.digest for r in requests}} | alike)
        kept.path.unlink()


class _Kept:
    """The measurements so far, in a file with a line of provenance and then one line per model."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, Rows] = {}
        head, *lines = _whole_lines(path) or [""]
        if head == _line(made_by):
            for line in lines:
                with suppress(ValueError, TypeError):  # a damaged line is measured again
                    self.rows |= json.loads(line)
        write_text(path, "".join([_line(made_by), *(_line({digest: rows}) for digest, rows in self.rows.items())]))

    def add(self, digest: str, rows: Rows) -> None:
        """Appends a model's rows."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({digest: rows}))


def _whole_lines(path: Path) -> list[str]:
    """Returns the file's lines, except one that a killed process left unfinished."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True) + "\n"
