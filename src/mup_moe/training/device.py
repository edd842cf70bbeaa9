"""What a device decides of the numbers: precision, the same bits from run to run, and which errors are its own."""

import os
from typing import Any

import torch

from mup_moe.config.settings import TrainingSettings


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of the GPU's memory: compilers and captures have their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def is_lost_device(error: BaseException) -> bool:
    """Whether an error says that the GPU itself failed."""
    marks = ("CUDA error", "cuda runtime error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL")
    told = isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    return told or isinstance(error, torch.AcceleratorError)
