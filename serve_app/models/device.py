"""Where and how precisely a stage computes."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass

import torch

from serve_app.config.settings import ComputeConfig
from serve_app.request.errors import ConfigurationError

# Parameters of glibc's mallopt(3), and what they are set to, in bytes.
_M_TRIM_THRESHOLD, _KEPT = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _FROM_HEAP = -3, 32 * 2**20


@dataclass(frozen=True)
class Compute:
    """A device and the dtype of a stage's weights and activations."""

    device: torch.device
    dtype: torch.dtype


def set_up(config: ComputeConfig, gpu_fraction: float = 0.0) -> Compute:
    """Chooses device and dtype, sets the process's threads, and holds its GPU memory to its fraction.

    `gpu_fraction` is the share of one GPU that Ray assigned to this replica. Ray only books it; the
    process itself must stay within it. A fraction covers the allocator's memory, not the CUDA context,
    for which the configurations leave room.
    """
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    device = config.device
    if device == "auto":
        device = "cuda" if gpu_fraction > 0 and torch.cuda.is_available() else "cpu"
    if device == "cuda" and gpu_fraction == 0:
        # Ray hides no GPU from a replica that booked none: it would compute unbooked and without a bound.
        raise ConfigurationError("device is cuda, but the deployment has no num_gpus")
    if device == "cuda" and gpu_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_fraction)
    if device == "cpu":
        keep_freed_memory()
    dtype = config.dtype
    if dtype == "auto":
        if device == "cpu":
            dtype = "float32"
        else:
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return Compute(torch.device(device), getattr(torch, dtype))


def keep_freed_memory() -> None:
    """Has this process keep up to 2 GB of the memory that a forward pass frees, for the next one.

    By default glibc gives it back to the system, which zeroes it anew, page by page. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)


def describe(compute: Compute) -> str | None:
    """The name of a GPU; None on the CPU."""
    return torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else None


def free_memory() -> None:
    """Gives back the GPU memory of models that this process has dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_context_broken(error: Exception) -> bool:
    """Whether an error leaves the CUDA context unusable: every later call in this process would fail.

    Running out of memory does not, in a library's workspace (CUBLAS_STATUS_ALLOC_FAILED) either.
    """
    if is_out_of_memory(error):
        return False
    text = str(error)
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and ("CUDA error" in text or "EXECUTION_FAILED" in text)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass found too little memory, of the device or of the machine."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "ALLOC_FAILED" in text
        or "can't allocate memory" in text  # PyTorch's allocator on the CPU
    )
