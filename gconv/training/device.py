"""Where a network is trained: the device, what it was made with, and whether it can compile."""

from __future__ import annotations

import platform
from typing import Any

import torch

from gconv.functional.expansion import is_tf32_allowed
from gconv.kernels.config import kernel_config
from gconv.system.errors import InputError, one_of

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.

    Raises:
        InputError: another name, or ``cuda`` where PyTorch has no GPU.
    """
    if name not in DEVICES:
        raise one_of("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU is available to PyTorch here; give --device cpu or auto")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and the hardware that a run is made with, as plain data for its record."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "kernel": kernel_config(),
        **({"tf32": is_tf32_allowed()} if on_gpu else {}),
    }


def check_compiler(device: torch.device) -> None:
    """Compile the smallest function, to see whether ``torch.compile`` works.

    Raises:
        InputError: it does not.
    """
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:  # of several kinds: no compiler, a compiler that fails, or no headers
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"torch.compile does not work here ({reason}); it needs a C++ compiler") from error
