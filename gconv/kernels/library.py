"""The compiled kernels of this package: loading their library, calling its functions, and when these may be called.

``csrc`` is compiled when the package is installed, if there is a C compiler. Everything that it computes, PyTorch's
operations compute too, only slower. The library runs on PyTorch's own threads.

A library is used only if it was built from these very sources, and its structures have the sizes that Python expects.
Otherwise it could read memory wrongly, and give wrong numbers without an error.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Callable
from ctypes import c_double, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gconv.system.errors import InputError

from .sources import digest, sources

try:
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
except ImportError:  # private to PyTorch: without them no layer runs in the kernel
    TorchDispatchMode = object  # type: ignore[assignment, misc]

    def _get_current_dispatch_mode() -> TorchDispatchMode | None:
        raise AttributeError


PATH = Path(__file__).with_name("_compiled.so")
"""The library, which ``setup.py`` builds."""

INTERFACE = 4
"""The same number as in ``csrc/layer.h``: it changes with the arguments of any function and with the structures."""

INSTRUCTIONS = ("any", "avx2", "avx512")
"""The instruction sets that the kernels are compiled for, in the order of their numbers in ``csrc/versions.h``. ``any``
is what the compiler uses without being told: SSE2 on x86-64, NEON on aarch64."""

MAX_K, MAX_ORDER = 15, 8
"""The largest size of a spatial kernel and the largest group: ``MOST_K`` and ``MOST_ORDER`` of ``csrc/layer.h``."""

PRODUCT_ENTRIES = 12
"""The entries of a row of the table of products in ``csrc/layer.h``."""


GRAIN = 320_000
"""Multiply-accumulates that a thread must have to do; with fewer, fewer threads are used. They take about 12
microseconds, several times what it takes to wake a thread and to wait for it."""


class Layer(ctypes.Structure):
    """``struct layer`` of ``csrc/layer.h``."""

    _fields_ = (
        *((name, c_int) for name in ("order", "in_channels", "out_channels", "rank", "spatial_first")),
        *((name, c_int) for name in ("k", "stride", "padding", "whole", "height", "width", "out_height", "out_width")),
        *((name, c_int) for name in ("products", "in_basis", "biased", "weights", "weights_back")),
        *((name, c_void_p) for name in ("table", "matrices", "basis", "pixels")),
    )


_LAYER, _SIZES = ctypes.POINTER(Layer), ctypes.POINTER(c_size_t)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # by name: the type of the result, and those of the arguments
    "pack": (c_int, [c_int, _LAYER, c_int, *[c_void_p] * 4]),
    "forward": (c_int, [c_int, _LAYER, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p]),
    "backward": (c_int, [c_int, _LAYER, c_int, c_int, *[c_void_p] * 7]),
    "workers": (c_int, [c_int, _LAYER, c_int, c_int, c_int]),
    "rows": (None, [_LAYER, c_int, c_int, c_int, c_int, _SIZES, _SIZES]),
    "small_conv": (c_int, [*[c_int] * 7, c_void_p, c_void_p, c_void_p, c_int, c_void_p]),
    "norm": (c_int, [c_int, c_int, c_size_t, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p]),
    "norm_train": (c_int, [c_int, c_int, c_size_t, c_int, c_int, *[c_void_p] * 3, c_double, c_int, *[c_void_p] * 3]),
    "norm_backward": (c_int, [c_int, c_int, c_size_t, c_int, c_int, *[c_void_p] * 6, c_double, *[c_void_p] * 3]),
    "version_instructions": (c_int, [c_int]),
    "version_lanes": (c_int, [c_int]),
    "supports": (c_int, [c_int]),
    "use_threads": (None, [*[c_void_p] * 3, c_double]),
    "interface": (None, [ctypes.POINTER(c_int)]),
    "sources": (ctypes.c_char_p, []),
}


class Library(NamedTuple):
    """The compiled library, loaded and checked.

    Attributes:
        functions: its functions by name, without the prefix ``gconv_``.
        processor: the names of the instruction sets that this processor has.
        instructions: the number of the best one that the kernels may use; see :data:`INSTRUCTIONS`.
        threaded: whether it runs on PyTorch's threads, or on the calling thread alone.
    """

    functions: dict[str, Callable[..., Any]]
    processor: tuple[str, ...]
    instructions: int
    threaded: bool


class Found(NamedTuple):
    """What was found of the library: itself, or one line that says why it is not used."""

    library: Library | None
    why_not: str | None = None


class UnfitLibraryError(Exception):
    """The library is there but must not be used."""


@cache
def find_library() -> Found:
    """Load and check the library, once for the process.

    A library that is there and does not fit is not used, and a warning says so and how to rebuild it.

    Raises:
        InputError: ``GCONV_KERNEL`` is not one of the names above, or this processor does not have it; or
            ``GCONV_REQUIRE_KERNEL`` is 1 and there is no library that fits.
    """
    chosen = os.environ.get("GCONV_KERNEL", "")
    if chosen not in ("", "none", *INSTRUCTIONS):
        raise InputError(f"GCONV_KERNEL is {chosen!r}; accepted: {', '.join(INSTRUCTIONS)}, none")
    if chosen == "none":
        return Found(None, "GCONV_KERNEL is none")
    try:
        if not PATH.exists():
            reason = f"{PATH} was not built"
            if platform.machine() not in ("x86_64", "aarch64", "arm64") or sys.platform == "win32":
                reason += f", and building it has not been tried on {platform.system()} {platform.machine()}"
            return _unused(f"{reason}. {_remedy()}", warn=False)
        return Found(load(PATH, chosen))
    except UnfitLibraryError as error:
        return _unused(f"{error}. {_remedy()}", warn=True)


def _unused(reason: str, warn: bool) -> Found:
    if os.environ.get("GCONV_REQUIRE_KERNEL") == "1":
        raise InputError(f"GCONV_REQUIRE_KERNEL is 1, but {reason}")
    if warn:
        warnings.warn(f"The compiled kernels of gconv are not used: {reason}", RuntimeWarning, stacklevel=4)
    return Found(None, reason)


def _remedy() -> str:
    """What to type for a library that fits."""
    root = PATH.parents[2]
    if (root / "setup.py").exists() and sources():
        return f"Build it with: cd {root} && {sys.executable} setup.py build_ext --inplace"
    return "Build it with: pip install --force-reinstall --no-deps --no-binary gconv-separable gconv-separable"


def load(path: Path, chosen: str = "") -> Library:
    """Load a library and check that it fits.

    Args:
        path: the file.
        chosen: the name of the best instruction set that the kernels may use; by default the best of this processor.

    Raises:
        UnfitLibraryError: it cannot be loaded, or was built from other sources.
        InputError: this processor does not have the instruction set.
    """
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnfitLibraryError(f"{path} cannot be loaded ({error})") from None
    functions = {}
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(loaded, f"gconv_{name}")
        except AttributeError:
            raise UnfitLibraryError(f"{path} is of another version: it has no function gconv_{name}") from None
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    numbers = (c_int * 5)()
    functions["interface"](numbers)
    expected = [INTERFACE, ctypes.sizeof(Layer), PRODUCT_ENTRIES, MAX_K, MAX_ORDER]
    if list(numbers) != expected:
        raise UnfitLibraryError(f"{path} is of another version: its sizes are {list(numbers)}, not {expected}")
    if sources() and functions["sources"]().decode() != digest():
        raise UnfitLibraryError(f"{path} was built from other sources than those in {sources()[0].parent}")
    processor = tuple(name for number, name in enumerate(INSTRUCTIONS) if functions["supports"](number))
    if chosen and chosen not in processor:
        here = ", ".join(processor)
        raise InputError(f"GCONV_KERNEL is {chosen}, which this processor does not have; accepted here: {here}, none")
    instructions = INSTRUCTIONS.index(chosen or processor[-1])
    openmp = openmp_functions()
    functions["use_threads"](*(openmp or (None, None, None)), GRAIN)
    return Library(functions, processor, instructions, openmp is not None)


def openmp_functions() -> list[int | None] | None:
    """The addresses of the OpenMP functions by which the library uses PyTorch's threads; None where there are none."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    for place in (str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"), None):
        try:
            openmp = ctypes.CDLL(place)
            names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
            return [ctypes.cast(getattr(openmp, name), c_void_p).value for name in names]
        except (OSError, AttributeError, TypeError):  # PyTorch has no OpenMP, or one without these functions
            continue
    return None


def library() -> Library | None:
    """The compiled library; None where it is not used, which :func:`find_library` gives the reason for."""
    return find_library().library


def kernel_class() -> str:
    """The class of this machine: the instruction set that the kernels use, or ``none`` where there are no kernels."""
    found = library()
    return "none" if found is None else INSTRUCTIONS[found.instructions]


def require_library() -> Library:
    """The compiled library, where the caller knows that it is there."""
    found = library()
    assert found is not None
    return found


def threads() -> int:
    """The number of threads that the kernels may use."""
    return torch.get_num_threads() if require_library().threaded else 1


def launch(name: str, *arguments: Any) -> None:
    """Call a compiled function, so that a profiler sees it as ``gconv::name``.

    Raises:
        MemoryError: the function found no memory.
    """
    function = require_library().functions[name]
    if _is_profiling():
        with torch.profiler.record_function(f"gconv::{name}"):
            failed = function(*arguments)
    else:
        failed = function(*arguments)
    if failed:
        raise MemoryError(f"no memory for gconv::{name}")


def _is_profiling() -> bool:
    enabled = getattr(torch.autograd, "_profiler_enabled", None)  # private to PyTorch: without it nothing is labelled
    return enabled is not None and enabled()


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
    try:  # private to PyTorch: one without any of these runs its own operations
        forward_mode = forward_ad._current_level >= 0
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # then any tensor may be a wrapper
        if forward_mode or transformed or torch.is_autocast_enabled("cpu"):
            return False
        return not torch._C._len_torch_dispatch_stack() or isinstance(_get_current_dispatch_mode(), TensorLifetimeMode)
    except AttributeError:
        return False


class TensorLifetimeMode(TorchDispatchMode):
    """A dispatch mode that watches which tensors are alive, not which operations make them."""


def address(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first value. It keeps nothing alive."""
    return None if tensor is None else tensor.data_ptr()
