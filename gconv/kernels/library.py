"""The compiled kernels of this package: loading their library, calling its functions, and when these may be called.

``csrc`` is compiled when the package is installed, if there is a C compiler. Everything that it computes, PyTorch's
operations compute too, only slower. The library runs on PyTorch's own threads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built, or does not fit this PyTorch."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_compiled{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # for example because PyTorch has loaded no OpenMP that has its symbols
                return None
    return None


def require_library() -> ctypes.CDLL:
    """The compiled library, where the caller knows that it is there."""
    found = library()
    assert found is not None
    return found


def launch(name: str, *arguments: Any) -> None:
    """Call a compiled function, so that a profiler sees it as ``gconv::name``.

    Raises:
        MemoryError: the function found no memory.
    """
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        with torch.profiler.record_function(f"gconv::{name}"):
            failed = getattr(require_library(), f"gconv_{name}")(*arguments)
    else:
        failed = getattr(require_library(), f"gconv_{name}")(*arguments)
    if failed:
        raise MemoryError(f"no memory for gconv::{name}")


def is_supported(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the library is there, and its functions may read these tensors and give all that is asked of a map x.

    They read single precision on a CPU. They know nothing of forward-mode derivatives, function transforms and
    autocast. A dispatch mode, such as a counter of operations, would not see them; only a
    :class:`TensorLifetimeMode` need not.
    """
    if library() is None:
        return False
    for t in (x, *parameters):
        if t is not None and not (t.is_cpu and t.dtype is torch.float32):
            return False
    forward_mode = forward_ad._current_level >= 0
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # then any of the tensors may be a wrapper
    if forward_mode or transformed or torch.is_autocast_enabled("cpu"):
        return False
    return not torch._C._len_torch_dispatch_stack() or isinstance(_get_current_dispatch_mode(), TensorLifetimeMode)


class TensorLifetimeMode(TorchDispatchMode):
    """A dispatch mode that watches which tensors are alive, not which operations make them."""


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's first value. It keeps nothing alive."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
