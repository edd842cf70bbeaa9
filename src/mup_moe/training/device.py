"""How a device affects the numbers: precision, bitwise reproducibility, and which errors come from the device."""

import os
from typing import Any

import torch

from mup_moe.config.settings import TrainingSettings


def precision_on(device: torch.device, settings: TrainingSettings) -> str:
    """Resolves the setting `precision` on a device to float32 or bfloat16."""
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether the device has bfloat16 instructions; emulated bfloat16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # torch must use AVX-512 too; ATEN_CPU_CAPABILITY can restrict it to AVX2.
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def prepare_gpus() -> None:
    """Makes torch deterministic to the bit on GPUs; call it before anything runs there."""
    # Determinism in cuBLAS requires a fixed workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without `warn_only`, because with it attention's backward pass is not deterministic.
    torch.use_deterministic_algorithms(True)
    # Every tensor is written before it is read, so filling it with NaN first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # cuDNN attention raises an error if it cannot build a plan, while the other backends fall back to each other.
    torch.backends.cuda.enable_cudnn_sdp(False)


def allow_nondeterministic(error: BaseException) -> bool:
    """Gives up determinism if `error` says that an operator has no deterministic kernel; False for other errors."""
    asked = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if not asked or "deterministic implementation" not in str(error):
        return False
    torch.use_deterministic_algorithms(True, warn_only=True)
    return True


def indexed(device: torch.device) -> torch.device:
    """Returns the device with its index; "cuda" without one means the current GPU."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error or its cause is out-of-memory: compilers and captures wrap it in their own errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def is_lost_device(error: BaseException) -> bool:
    """Returns whether an error means that the GPU itself failed."""
    marks = ("CUDA error", "cuda runtime error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL")
    marked = isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    return marked or isinstance(error, torch.AcceleratorError)
