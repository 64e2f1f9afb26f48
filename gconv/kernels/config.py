"""Which kernels run on this machine: as plain data for records, and as text."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from .library import INSTRUCTIONS, PATH, find_library


def kernel_config() -> dict[str, Any]:
    """What is known of the compiled kernels, as plain data.

    Returns:
        ``used``: whether layers can run in them; ``instructions``: the instruction set that they use, else None;
        ``threads``: how many they may use; ``why_not``: if they are not used, why, else None.

    Raises:
        InputError: as of :func:`gconv.kernels.library.find_library`.
    """
    found, why_not = find_library()
    return {
        "used": found is not None,
        "instructions": None if found is None else INSTRUCTIONS[found.instructions],
        "threads": torch.get_num_threads() if found is not None and found.threaded else 1,
        "why_not": why_not,
    }


def configuration() -> dict[str, Any]:
    """Versions, machine and kernels, as plain data. What :func:`show_config` prints.

    Raises:
        InputError: as of :func:`gconv.kernels.library.find_library`.
    """
    found, _ = find_library()
    return {
        "gconv": sys.modules["gconv"].__version__,  # this package itself; imports lead to its rooms only
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "library": str(PATH),
        "processor": None if found is None else list(found.processor),
        "kernel": kernel_config(),
    }


def show_config() -> None:
    """Print versions, machine and kernels: whether layers run in the compiled kernels, how, and if they do not, why.

    Raises:
        InputError: ``GCONV_KERNEL`` or ``GCONV_REQUIRE_KERNEL`` ask for what is not there.
    """
    known = configuration()
    kernel = known["kernel"]
    rows = {
        "gconv": known["gconv"],
        "Python": known["python"],
        "PyTorch": known["torch"],
        "platform": known["platform"],
        "threads": known["threads"],
        "compiled kernels": "used" if kernel["used"] else f"not used: {kernel['why_not']}",
    }
    if kernel["used"]:
        rows["library"] = known["library"]
        rows["instructions"] = f"{kernel['instructions']} (this processor has {', '.join(known['processor'])})"
        on_threads = f"{kernel['threads']}, those of PyTorch"
        rows["kernel threads"] = on_threads if kernel["threads"] == known["threads"] else "1: PyTorch has no OpenMP"
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
