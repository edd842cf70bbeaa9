"""Choosing the device, one GPU to a job."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from mup_moe.files import UserError


@contextlib.contextmanager
def claim_device(wanted: str) -> Iterator[torch.device]:
    """The device for "cpu", "cuda" or "auto" (a GPU where there is one).

    Jobs on one machine share its GPUs by file locks: each takes one that is free, or waits. Raises
    UserError where "cuda" is wanted and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to this job: set `execution.device` to cpu or auto, or give the job a GPU")
    # The same bits from run to run: cuBLAS needs a fixed workspace, attention a backward without atomics.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with _free_gpu() as index:
        yield torch.device("cuda", index)


@contextlib.contextmanager
def _free_gpu() -> Iterator[int]:
    folder = Path(tempfile.gettempdir()) / f"mup-moe-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    waiting = False
    while True:
        for index in range(torch.cuda.device_count()):
            lock = FileLock(folder / f"{torch.cuda.get_device_properties(index).uuid}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield index
            finally:
                lock.release()
            return
        if not waiting:
            print("every GPU is taken by another cell; waiting for one", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(1)
