"""What the benchmarks share: their options, and where their rows go and come from."""

import argparse
import csv
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe import provenance  # noqa: E402

# What keeps a process and its libraries (torch, oneDNN, oneMKL, OpenBLAS) to some instructions of the CPU.
INSTRUCTIONS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}

PROVENANCE = ("torch", "transformers", "cpu", "gpu", "threads", "date")


def machine_row(device: str, threads: int) -> list[Any]:
    """The values of `PROVENANCE`."""
    versions = provenance.versions("transformers")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [torch.__version__, versions["transformers"], provenance.machine()["cpu"], gpu, threads, today]


def instructions_of(device: str) -> list[str]:
    """What there is to measure: all of a CPU's instructions, and AVX2 where that is less."""
    more = device == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return ["native", *(["avx2"] if more else [])]


def rows_with(instructions: str, script: str) -> list[list[str]]:
    """The rows of this very script in a process that keeps to such instructions."""
    given = [word for word in sys.argv[1:] if word not in ("--instructions", *INSTRUCTIONS)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.csv"
        command = [sys.executable, script, *given, "--instructions", "native", "--out", out]
        if subprocess.run(command, env=os.environ | INSTRUCTIONS[instructions]).returncode:
            sys.exit(f"measuring with {instructions} failed")
        with out.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[1:]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of training have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--request", type=Path, help="a training request as JSON, in place of config.yaml")
    made.add_argument("--out", type=Path, help=f"default: benchmarks/{name}.csv, on a GPU benchmarks/gpu/{name}.csv")
    return made


def out_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the rows go."""
    if arguments.out is not None:
        return Path(arguments.out)
    folder = ROOT / "benchmarks"
    return (folder / "gpu" if arguments.device == "cuda" else folder) / f"{name}.csv"


@contextmanager
def told(what: str) -> Iterator[None]:
    """Says on standard error what takes its time."""
    start = time.perf_counter()
    print(f"{what} ...", file=sys.stderr, flush=True)
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> float:
    """How long a piece of work takes, until the device is done."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
