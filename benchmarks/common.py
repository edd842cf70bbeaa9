"""Shared code of the benchmarks: their options, provenance, and where rows are written."""

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

# Environment variables that limit a process and its libraries (torch, oneDNN, oneMKL, OpenBLAS) to an instruction set.
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
    """Returns the values of the columns in `PROVENANCE`."""
    versions = provenance.versions("transformers")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [torch.__version__, versions["transformers"], provenance.machine()["cpu"], gpu, threads, today]


def instructions_of(device: str) -> list[str]:
    """Returns the instruction sets to measure: all of a CPU's instructions, and AVX2 if the CPU has more than that."""
    more = device == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return ["native", *(["avx2"] if more else [])]


def rows_with(instructions: str, script: str) -> list[list[str]]:
    """Runs the same script in a process that is limited to an instruction set, and returns its rows."""
    given = [word for word in sys.argv[1:] if word not in ("--instructions", *INSTRUCTIONS)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.csv"
        command = [sys.executable, script, *given, "--instructions", "native", "--out", out]
        if subprocess.run(command, env=os.environ | INSTRUCTIONS[instructions]).returncode:
            sys.exit(f"measuring with {instructions} failed: see the error above")
        with out.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[1:]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks of training share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--request", type=Path, help="a training request as JSON, instead of config.yaml")
    made.add_argument("--out", type=Path, help=f"default: benchmarks/{name}.csv, or benchmarks/gpu/{name}.csv on a GPU")
    return made


def out_path(arguments: argparse.Namespace, name: str) -> Path:
    """Returns the path that the rows are written to."""
    if arguments.out is not None:
        return Path(arguments.out)
    folder = ROOT / "benchmarks"
    return (folder / "gpu" if arguments.device == "cuda" else folder) / f"{name}.csv"


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Announces a piece of work on standard error, and then how long it took."""
    start = time.perf_counter()
    print(f"{what} ...", file=sys.stderr, flush=True)
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> float:
    """Returns how long a piece of work takes, including the work queued on the device."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
