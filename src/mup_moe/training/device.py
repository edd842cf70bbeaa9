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

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
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

    Jobs on one machine share its GPUs by file locks: each takes one that is free, or waits. beside: work
    on the first GPU beside whatever has it, within the memory that is free now. Raises UserError where
    "cuda" is wanted and there is none.
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


def prepare_gpus() -> None:
    """Has torch compute the same bits from run to run on GPUs; to be called before anything runs there."""
    # cuBLAS needs a fixed workspace for it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not `warn_only`: attention's backward is deterministic only where the rest has to be.
    torch.use_deterministic_algorithms(True)
    # Every tensor is written before it is read: filling each with NaN first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A plan that cuDNN cannot build is an error there, where the others give way to each other.
    torch.backends.cuda.enable_cudnn_sdp(False)


def allow_nondeterministic(error: BaseException) -> bool:
    """Gives up the same bits where `error` says that an operator has no such kernel; False for any other error."""
    asked = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if not asked or "deterministic implementation" not in str(error):
        return False
    torch.use_deterministic_algorithms(True, warn_only=True)
    return True


def indexed(device: torch.device) -> torch.device:
    """The device with its number: "cuda" alone means whichever GPU is the current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


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
    # Nor where torch itself was asked to keep to AVX2 (ATEN_CPU_CAPABILITY).
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of the GPU's memory: compilers and captures have their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def explain_lost_device(error: BaseException) -> str | None:
    """What to do about an error by which the GPU itself failed; None for any other."""
    text = " ".join(str(error).split())
    marks = ("CUDA error", "cuda runtime error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL")
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and any(m in text for m in marks)):
        return (
            "the GPU failed: run the same command again, which goes on from the last checkpoint, and look after"
            f" that GPU if it fails once more ({text})"
        )
    return None


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


def keep_compiled_code_apart() -> None:
    """Has torch compile again for another kind of processor.

    Its cache takes code for AVX-512 to be code for AVX2, and machines that differ may share the folder.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
