"""Measures the models of a probe, one after the other: python -m mup_moe probe."""

import argparse

import torch
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.data.tokens import Tokens
from mup_moe.files import write_csv, write_json
from mup_moe.ops.device import claim_device
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import one_of
from mup_moe.training.probe import measure
from mup_moe.training.version import VERSION

COLUMNS = ("parametrization", "width", "seed", "step", "quantity", "block", "value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("probe", help="its name in the config")
    add_config_arguments(parser)
    how = parser.add_argument_group("how to train (default: `execution` of the config)")
    how.add_argument("--device", choices=["auto", "cpu", "cuda"])
    how.add_argument("--threads", type=int, metavar="N")


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/PROBE/values.csv, a row per model, step, quantity and block. Raises UserError."""
    sweep = read_sweep(arguments)
    name, execution = one_of(arguments.probe, sweep.config.probes, "probes"), sweep.config.execution
    probe, out = sweep.config.probes[name], sweep.probe_values(name)
    # The widest last: its memory is given back as the process ends.
    requests = [sweep.request(cell) for cell in sorted(probe.cells(), key=lambda cell: cell.width)]
    torch.set_num_threads(arguments.threads or execution.threads)
    tokens = Tokens.open(sweep.tokens(sweep.probe_corpus(name)), verify=True)
    rows = []
    with claim_device(arguments.device or execution.device) as device:
        for request in tqdm(requests, unit="model", mininterval=5, ascii=True):
            model = (request.cell.parametrization, request.cell.width, request.cell.seed)
            for step, (key, value) in measure(request, probe.measure, probe.steps, tokens, device):
                rows.append((*model, step, *key, f"{value:.9g}"))
    write_csv(out, COLUMNS, rows)
    write_json(
        out.with_suffix(".json"),
        {
            "requests": {request.cell.id: request.digest for request in requests},
            "tokens": tokens.digests,
            "version": VERSION,
            "code": provenance.code_digest(),
            "device": device.type,
            "machine": provenance.machine(),
            "versions": provenance.versions("numpy") | {"torch": str(torch.__version__)},
        },
    )
