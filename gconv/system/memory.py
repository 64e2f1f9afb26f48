"""What the C library does with the memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

import torch

_USUAL_BLOCK = 31 * 2**20  # glibc learns from blocks of up to 32 MiB, with its own bytes and the alignment


def raise_mmap_threshold() -> None:
    """Let the C library keep freed blocks of up to 31 MiB, such as the maps of a small network, for new tensors.

    glibc returns a large freed block to the system at once. Every pass of a network then gets its blocks anew, page by
    page, and the system clears each page. glibc takes a block for large if it is larger than all blocks freed so far,
    up to 32 MiB, so that the speed of a network would depend on what the process did before. This function frees one
    block of that size. It is never written to, so it takes no memory. Afterwards the process may keep up to twice that
    size. With another C library this has no effect.
    """
    torch.empty(_USUAL_BLOCK, dtype=torch.uint8)


def reuse_freed_memory() -> None:
    """Let this process keep all memory that it frees for its next tensors. It has an effect on Linux with glibc only.

    This goes further than :func:`raise_mmap_threshold`, for the large maps of training. It is meant for a program that
    trains, not for a library.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_max = -1, -4
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, -1)
