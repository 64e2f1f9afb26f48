"""How the C library keeps the memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

import torch

_USUAL_BLOCK = 31 * 2**20  # the largest that glibc learns from is 32 MiB with its own bytes and the alignment


def raise_mmap_threshold() -> None:
    """Let the C library keep freed blocks of the size of a small network's maps (below 31 MiB) for the next ones.

    glibc returns large blocks to the system at once, and gets new ones page by page, cleared, in every pass of a
    network. What is large it learns from the largest block freed so far, up to 32 MiB, so that
    the same network is fast or slow by what the process did before. This frees one such block, never touched, so it
    costs no memory; up to twice its size may stay with the process. Elsewhere it does nothing.
    """
    torch.empty(_USUAL_BLOCK, dtype=torch.uint8)


def reuse_freed_memory() -> None:
    """Let this process keep all memory that it frees, for its next tensors; on Linux with glibc, else nothing.

    Beyond :func:`raise_mmap_threshold`, for the large maps of training. For programs that train, not for libraries.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_max = -1, -4
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, -1)
