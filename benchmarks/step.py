"""Speed of the training step: tokens/s of the default cells, beside the machine's matmul rate.

python benchmarks/step.py [--figure figure1] [--out benchmarks/step.csv] [--seconds 3]

Both are measured in turn, in one process with one thread, and the medians of the interleaved rounds
are reported, so that a noisy machine disturbs both alike. The fraction of the matmul rate counts the
training FLOPs of `model_size` (6 per active matrix entry, and attention).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe import provenance  # noqa: E402
from mup_moe.config.load import read_config  # noqa: E402
from mup_moe.files import write_csv  # noqa: E402
from mup_moe.parametrization import parse_table  # noqa: E402
from mup_moe.training.request import TrainingRequest  # noqa: E402
from mup_moe.training.trainer import Trainer  # noqa: E402

COLUMNS = [
    *("architecture", "width", "experts", "granularity", "parameters", "flops_per_token"),
    *("tokens_per_second", "gflops", "matmul_gflops", "fraction_of_matmul", "torch", "cpu", "threads"),
]
WARM_UP_STEPS = 3
MATMUL_SIZE = 1024


def matmul_gflops() -> float:
    """The rate (GFLOP/s) of one float32 product of square matrices."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    start = time.perf_counter()
    torch.mm(a, b)
    return 2 * MATMUL_SIZE**3 / (time.perf_counter() - start) / 1e9


def shapes_of(figure: str) -> list[TrainingRequest]:
    """One request per shape among a figure's cells."""
    config = read_config(ROOT / "config.yaml")
    table = parse_table(config.parametrizations)
    requests = {}
    for cell in config.figures[figure].cells():
        setup = config.setups[cell.setup]
        request = TrainingRequest(cell, setup.model, setup.training, table[cell.parametrization])
        requests.setdefault((cell.architecture, cell.width, cell.experts, cell.granularity), request)
    return list(requests.values())


def main() -> None:
    """Measures every shape and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", default="figure1")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "step.csv")
    parser.add_argument("--seconds", type=float, default=3.0, help="of training per shape")
    parser.add_argument("--vocabulary", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # The speed of a step does not depend on which tokens it sees, but the router's balance does a
    # little: a skewed distribution is closer to text than a flat one.
    ids = np.random.default_rng(0).zipf(1.3, 200_000) % arguments.vocabulary
    tokens = ids.astype(np.uint16)
    trainers = [
        Trainer([request], tokens, tokens, arguments.vocabulary, torch.device("cpu"))
        for request in shapes_of(arguments.figure)
    ]
    for trainer in trainers:
        trainer.run(WARM_UP_STEPS)
        matmul_gflops()
    rates: dict[Trainer, list[float]] = {trainer: [] for trainer in trainers}
    peaks = []
    deadline = time.perf_counter() + arguments.seconds * len(trainers)
    while time.perf_counter() < deadline and all(t.step < t.settings.steps for t in trainers):
        for trainer in trainers:
            start = time.perf_counter()
            trainer.run(trainer.step + 1)
            rates[trainer].append(trainer.tokens_per_step / (time.perf_counter() - start))
            peaks.append(matmul_gflops())
    peak = statistics.median(peaks)
    versions, machine = provenance.versions("torch"), provenance.machine()
    rows = []
    for trainer, samples in rates.items():
        cell, rate = trainer.requests[0].cell, statistics.median(samples)
        gflops = rate * trainer.size.flops_per_token / 1e9
        rows.append(
            [
                *(cell.architecture, cell.width, cell.experts, cell.granularity),
                *(trainer.size.parameters, trainer.size.flops_per_token, round(rate)),
                *(round(gflops, 1), round(peak, 1), round(gflops / peak, 3)),
                *(versions["torch"], machine["cpu"], torch.get_num_threads()),
            ]
        )
        print(
            f"{cell.architecture} width {cell.width}: {rate:,.0f} tokens/s, {gflops / peak:.0%} of {peak:.0f} GFLOP/s"
        )
    write_csv(arguments.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
