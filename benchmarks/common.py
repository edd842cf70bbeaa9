"""What the benchmarks share: their options, and where their rows go and come from."""

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe import provenance  # noqa: E402

PROVENANCE = ("torch", "transformers", "cpu", "gpu", "threads", "date")


def machine_row(device: str, threads: int) -> list[Any]:
    """The values of `PROVENANCE`."""
    versions = provenance.versions("transformers")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [torch.__version__, versions["transformers"], provenance.machine()["cpu"], gpu, threads, today]


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
