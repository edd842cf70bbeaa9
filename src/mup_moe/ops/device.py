"""What keeps a job alive on a machine: one GPU to a job, how its steps are issued, its memory, its errors."""

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

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# The most that glibc takes, and what a step of a small model frees, several times over.
_MMAP_BYTES, _KEPT_BYTES = 32 * 2**20, 512 * 2**20
# The rest is for what torch does not count, and for the job that has the GPU.
_SHARE_OF_FREE = 0.5


def type_of(wanted: str) -> str:
    """What "cpu", "cuda" or "auto" (a GPU where there is one) comes to: cpu or cuda."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


@contextlib.contextmanager
def claim_device(wanted: str, *, beside: bool = False) -> Iterator[torch.device]:
    """The device for what is wanted, as `type_of` takes it.

    Jobs on one machine share its GPUs by file locks: each takes one that is free, or waits. beside: work on the
    first GPU beside whatever has it, within the memory that is free now. Raises UserError where there is none.
    """
    if type_of(wanted) == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to this job: set `execution.device` to cpu or auto, or give the job a GPU")
    prepare_gpus()
    if beside:
        free, total = torch.cuda.mem_get_info(0)
        torch.cuda.set_per_process_memory_fraction(_SHARE_OF_FREE * free / total, 0)
        yield torch.device("cuda", 0)
        return
    with _free_gpu() as index:
        # Streams and graphs are those of the current device.
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
            print("every GPU is taken by another cell; waiting for one", file=sys.stderr, flush=True)
        time.sleep(1)


def step_on(device: torch.device, wanted: str) -> str:
    """What `step` comes to on a device: eager, compiled or graph.

    Raises UserError for a graph on a CPU, and where torch's compiler has nowhere to write, but for "auto".
    """
    if wanted == "graph" and device.type != "cuda":
        raise UserError("a step can be replayed as a CUDA graph on a GPU only: set `execution.step` to auto")
    step = wanted if wanted != "auto" else "graph" if device.type == "cuda" else "eager"
    if step == "eager" or (problem := _problem_of_compiler_cache()) is None:
        return step
    what = f"the compiler's cache cannot be written ({problem})"
    if wanted != "auto":
        raise UserError(f"{what}: set TORCHINDUCTOR_CACHE_DIR to a folder that can be, or `execution.step` to auto")
    print(f"{what}: steps are issued operator by operator instead", file=sys.stderr, flush=True)
    return "eager"


def _problem_of_compiler_cache() -> str | None:
    """Why torch's compiler cannot write its files, without which it does not even start; None where it can."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return str(error)
    return None


def explain_out_of_memory(error: BaseException) -> str | None:
    """What to do about an error that is one of memory; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is too small: lower `batch_size`, or `execution.replicas` if it is set ({text})"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"the memory is too small: give the job more (`mem_mb`), or lower `execution.replicas` ({text})"
    return None


def explain_lost_device(error: BaseException) -> str | None:
    """What to do about an error by which the GPU itself failed; None for any other."""
    if not is_lost_device(error):
        return None
    what = "the GPU failed: run the same command again, which goes on from the last checkpoint, and look after that GPU"
    return f"{what} if it fails once more ({' '.join(str(error).split())})"


def keep_freed_pages(of_any_size: bool = False) -> None:
    """Has malloc reuse what it frees: a step's buffers would cost a page fault each 4 KiB, every step.

    of_any_size: buffers of more than 32 MiB too, so that the process keeps all that it ever had. Where there is no
    glibc, nothing changes.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TOP_PAD, _MMAP_BYTES)
        if of_any_size:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


def keep_compiled_code_apart() -> None:
    """Has torch compile again for another kind of processor.

    Its cache takes code for AVX-512 to be code for AVX2, and machines that differ may share the folder.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
