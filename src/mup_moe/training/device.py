"""Choosing the device, one GPU to a job, and what suits it."""

import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mup_moe.config.settings import TrainingSettings
from mup_moe.files import UserError

# A CPU gains by sharing each operator's overhead, up to about so many replicas, and loses once a stack
# has more parameters than its caches take (docs/decisions.md).
_CPU_REPLICAS, _CPU_PARAMETERS = 6, 16_000_000
# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# The most that glibc takes, and what a step of a small model frees, several times over.
_MMAP_BYTES, _KEPT_BYTES = 32 * 2**20, 512 * 2**20


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
    # The same bits from run to run, as far as torch has such kernels: cuBLAS needs a fixed workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every tensor is written before it is read: filling each with NaN first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with _free_gpu() as index:
        # Streams and graphs are those of the current device.
        torch.cuda.set_device(index)
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


def precision_on(device: torch.device, settings: TrainingSettings) -> str:
    """What `precision` comes to on a device: float32 or bfloat16."""
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def step_on(device: torch.device, wanted: str) -> str:
    """What `step` comes to on a device: eager, compiled or graph. Raises UserError for a graph on a CPU."""
    if wanted == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if wanted == "graph" and device.type != "cuda":
        raise UserError("a step can be replayed as a CUDA graph on a GPU only: set `execution.step` to auto")
    return wanted


def replicas_on(device: torch.device, wanted: str, parameters: int) -> int | None:
    """What `replicas` comes to on a device: how many cells at most are trained at once, None for all.

    parameters: of one cell. Raises UserError for what is no number.
    """
    if wanted == "auto":
        most = max(1, min(_CPU_REPLICAS, _CPU_PARAMETERS // parameters))
        return None if device.type == "cuda" else most
    if not wanted.isascii() or not wanted.isdigit() or int(wanted) == 0:
        raise UserError(f"--replicas is {wanted!r}: give a number from 1, or auto")
    return int(wanted)


def keep_freed_pages() -> None:
    """Has malloc reuse what it frees: a step's buffers would cost a page fault each 4 KiB, every step.

    Where there is no glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _MMAP_BYTES)
