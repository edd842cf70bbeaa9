"""Speed of a training step compared with another version of this repository.

python benchmarks/versions.py --other ../other-checkout [--widths 32 64 128 256 512] [--rounds 3]
                              [--turns 7] [--instructions native avx2] [--device cuda]
                              [--request request.json] [--out benchmarks/versions.csv]

Both versions train the same cells, those of the benchmarks or of a request, as the pipeline does by default. Each runs
its own code in its own process, and they take turns of equally many steps. `ratio` is the median over the turns of this
version's tokens/s divided by the other's; `ratio_low` and `ratio_high` are the quartiles. `same_losses` says whether
both report the same training losses, to the bit, in their first steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import INSTRUCTIONS, PROVENANCE, ROOT, announced, machine_row, out_path, parser, rows_with
from variants import read_request, stacked_variant

from mup_moe.files import UserError, write_csv

COLUMNS = (
    *("setup", "architecture", "width", "replicas", "precision", "instructions", "step", "other", "tokens_per_second"),
    *("other_tokens_per_second", "ratio", "ratio_low", "ratio_high", "same_losses"),
    *PROVENANCE,
)
_TURN_SECONDS = 0.3
_WARM_UP_STEPS = 5
# Runs with the modules of either checkout, so both must have everything that it uses.
_WORKER = """
import sys, time
checkout, architecture, width, replicas, device, threads, *request = sys.argv[1:]
sys.path[:0] = [checkout + "/benchmarks", checkout + "/src"]
from pathlib import Path
import torch
from variants import default_variant, read_request, trainer_of
from timing import keep_freed_pages  # both versions have it there
torch.set_num_threads(int(threads))
keep_freed_pages()
base = read_request(Path(request[0]) if request else None)
shape = {"architecture": architecture, "width": int(width)} | ({"experts": 1} if architecture == "dense" else {})
trainer = trainer_of(default_variant(base, device, replicas=int(replicas), **shape), base)
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    trainer.run(trainer.step + int(line))
    print(time.perf_counter() - start, trainer._history_TRM[: trainer.step, :, 0].double().sum().item(), flush=True)
"""


class Version:
    """A process that trains with the code of one checkout."""

    def __init__(self, checkout: Path, architecture: str, width: int, replicas: int, options: argparse.Namespace):
        command = [sys.executable, "-c", _WORKER, str(checkout), architecture, str(width), str(replicas)]
        command += [options.device, str(options.threads), *([str(options.request)] if options.request else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise UserError(f"{checkout} cannot be measured: choose a checkout of version 0.3.0 or later")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, steps: int) -> tuple[float, str]:
        """Takes steps. Returns the seconds, and the sum of all losses so far as text."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        seconds, _, losses = self._answer().partition(" ")
        return float(seconds), losses

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def compare(architecture: str, width: int, replicas: int, options: argparse.Namespace) -> list[Any]:
    """Measures one shape. Returns the columns from `tokens_per_second` to `same_losses`."""
    seconds_per_step: list[list[float]] = []
    same = True
    for _ in range(options.rounds):
        with ExitStack() as stack:
            versions = [Version(checkout, architecture, width, replicas, options) for checkout in (ROOT, options.other)]
            for version in versions:
                stack.callback(version.stop)
            same &= len({version.run(_WARM_UP_STEPS)[1] for version in versions}) == 1
            warm = [version.run(_WARM_UP_STEPS)[0] for version in versions]
            steps = max(1, round(_TURN_SECONDS * _WARM_UP_STEPS / warm[1]))
            seconds_per_step += [[version.run(steps)[0] / steps for version in versions] for _ in range(options.turns)]
    ours, theirs = (statistics.median(seconds) for seconds in zip(*seconds_per_step, strict=True))
    low, ratio, high = statistics.quantiles([other / mine for mine, other in seconds_per_step], n=4)
    return [1 / ours, 1 / theirs, round(ratio, 3), round(low, 3), round(high, 3), "yes" if same else "no"]


def rows_of(options: argparse.Namespace) -> Iterator[list[Any]]:
    """Yields a row for each shape, without the provenance."""
    base = read_request(options.request)
    instructions = torch.backends.cpu.get_cpu_capability() if options.device == "cpu" else None
    tokens = base.training.batch_size * base.model.sequence
    for architecture in options.architectures:
        for width in options.widths:
            shape = {"architecture": architecture, "width": width} | ({"experts": 1} if architecture == "dense" else {})
            variant = stacked_variant(base, options.device, **shape)
            replicas = variant.replicas
            with announced(f"{architecture}, width {width}"):
                mine, other, *rest = compare(architecture, width, replicas, options)
            rates = [round(tokens * replicas * rate) for rate in (mine, other)]
            how = [variant.precision, instructions, variant.step]
            yield [base.cell.setup, architecture, width, replicas, *how, options.name, *rates, *rest]


def main() -> None:
    """Measures each shape and writes a row for it."""
    options = parser(__doc__, "versions")
    options.add_argument("--other", type=Path, required=True, help="a checkout of the version to compare with")
    options.add_argument("--name", default="", help="name of that version in the table")
    options.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    options.add_argument("--architectures", nargs="+", choices=["moe", "dense"], default=["moe", "dense"])
    options.add_argument("--rounds", type=int, default=3, help="rounds, each with fresh processes")
    options.add_argument("--turns", type=int, default=7, help="turns of each version in a round")
    help_instructions = "instruction sets of the CPU"
    options.add_argument(
        "--instructions", nargs="+", choices=list(INSTRUCTIONS), default=["native"], help=help_instructions
    )
    arguments = options.parse_args()
    rows: list[list[Any]] = []
    for instructions in arguments.instructions:
        if instructions != "native":
            rows += rows_with(instructions, __file__)
            continue
        for row in rows_of(arguments):
            rows.append(row + machine_row(arguments.device, arguments.threads))
            print(json.dumps(dict(zip(COLUMNS, rows[-1], strict=True))), flush=True)
    write_csv(out_path(arguments, "versions"), COLUMNS, rows)


if __name__ == "__main__":
    main()
