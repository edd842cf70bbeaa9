"""How a job uses a machine: one GPU per job, how its steps are issued, its memory and its errors."""

import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch

from mup_moe.files import UserError, lock_file
from mup_moe.training.device import is_lost_device, prepare_gpus

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# The largest threshold that glibc accepts, and several times what a step of a small model frees.
_MMAP_BYTES, _KEPT_BYTES = 32 * 2**20, 512 * 2**20
# The rest is for memory that torch does not count, and for the job that holds the GPU.
_SHARE_OF_FREE = 0.5


def type_of(wanted: str) -> str:
    """Resolves "cpu", "cuda" or "auto" (a GPU if there is one) to cpu or cuda."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


@contextlib.contextmanager
def claim_device(wanted: str, *, shared: bool = False) -> Iterator[torch.device]:
    """Yields the device for a setting that `type_of` accepts.

    Jobs on one machine share its GPUs through file locks: each takes a free GPU, or waits for one. shared: use the
    first GPU without a lock, within part of the memory that is free now. Raises UserError if no GPU is visible.
    """
    if type_of(wanted) == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to this job: set `execution.device` to cpu or auto, or give the job a GPU")
    prepare_gpus()
    if shared:
        free, total = torch.cuda.mem_get_info(0)
        torch.cuda.set_per_process_memory_fraction(_SHARE_OF_FREE * free / total, 0)
        yield torch.device("cuda", 0)
        return
    with _free_gpu() as index:
        # Streams and graphs belong to the current device.
        torch.cuda.set_device(index)
        yield torch.device("cuda", index)


@contextlib.contextmanager
def _free_gpu() -> Iterator[int]:
    folder = Path(tempfile.gettempdir()) / f"mup-moe-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for tries in count():
        for index in range(torch.cuda.device_count()):
            lock = lock_file(folder / f"{torch.cuda.get_device_properties(index).uuid}.lock")
            if lock is not None:
                with lock:
                    yield index
                return
        if tries == 0:
            print("every GPU is in use by another job; waiting for one", file=sys.stderr, flush=True)
        time.sleep(1)


def step_on(device: torch.device, wanted: str) -> str:
    """Resolves `execution.step` on a device to eager, compiled or graph.

    Except for "auto", raises UserError for a graph on a CPU and if torch's compiler has nowhere to write.
    """
    if wanted == "graph" and device.type != "cuda":
        raise UserError("a step can be replayed as a CUDA graph only on a GPU: set `execution.step` to auto")
    step = wanted if wanted != "auto" else "graph" if device.type == "cuda" else "eager"
    if step == "eager" or (problem := _problem_of_compiler_cache()) is None:
        return step
    what = f"the compiler's cache cannot be written ({problem})"
    if wanted != "auto":
        raise UserError(f"{what}: set TORCHINDUCTOR_CACHE_DIR to a writable folder, or `execution.step` to auto")
    print(f"{what}: steps run operator by operator instead", file=sys.stderr, flush=True)
    return "eager"


def _problem_of_compiler_cache() -> str | None:
    """Returns why torch's compiler cannot write the files that it needs to start; None if it can."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return str(error)
    return None


def explain_out_of_memory(error: BaseException) -> str | None:
    """Returns what to do about an out-of-memory error; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is too small: lower `batch_size`, or `execution.replicas` if it is set ({text})"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"the memory is too small: give the job more memory (`mem_mb`), or lower `execution.replicas` ({text})"
    return None


def explain_lost_device(error: BaseException) -> str | None:
    """Returns what to do about an error that means the GPU itself failed; None for any other error."""
    if not is_lost_device(error):
        return None
    remedy = "rerun the same command to resume from the last checkpoint; if it fails again, check that GPU"
    return f"the GPU failed: {remedy} ({' '.join(str(error).split())})"


def keep_freed_pages(of_any_size: bool = False) -> None:
    """Makes malloc reuse freed pages; otherwise a step's buffers cost a page fault per 4 KiB in every step.

    of_any_size: also reuse buffers over 32 MiB, so that the process never returns memory. Does nothing without glibc.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TOP_PAD, _MMAP_BYTES)
        if of_any_size:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


def keep_compiled_code_apart() -> None:
    """Makes torch keep separate compiled code for each kind of processor.

    Its cache does not distinguish AVX-512 code from AVX2 code, and different machines may share the cache folder.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
