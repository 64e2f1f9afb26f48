"""The compiled part of this package, where it was built: loading it, batch norm, and convolutions of few channels.

``csrc`` is compiled when the package is installed, if there is a C compiler; all that it does PyTorch's operations do
too, only slower. It shares the threads of PyTorch: its OpenMP is the one that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from gconv.functional.expansion import has_channels_last_strides


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled; None where it was not, or does not go with this PyTorch."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_compiled{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # PyTorch has loaded no OpenMP that has its symbols, for one
                return None
    return None


def require_library() -> ctypes.CDLL:
    """The same, where it is known to be there."""
    found = library()
    assert found is not None
    return found


def launch(name: str, *given: Any) -> None:
    """A compiled function, which a profiler sees.

    Raises:
        MemoryError: it found no memory.
    """
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        with torch.profiler.record_function(f"gconv::{name}"):
            failed = getattr(require_library(), f"gconv_{name}")(*given)
    else:
        failed = getattr(require_library(), f"gconv_{name}")(*given)
    if failed:
        raise MemoryError(f"no memory for gconv::{name}")


def is_supported(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether compiled functions may read these tensors, and what they give is all that is asked of a map x.

    They know nothing of other types, of derivatives that are computed along, of function transforms and of autocast;
    and what watches the operations of PyTorch, such as a counter of them, would not see theirs, but for its tensors.
    """
    for t in (x, *parameters):
        if t is not None and not (t.is_cpu and t.dtype is torch.float32):
            return False
    along = forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if along or torch.is_autocast_enabled("cpu"):
        return False
    return not torch._C._len_torch_dispatch_stack() or isinstance(_get_current_dispatch_mode(), TensorLifetimeMode)


class TensorLifetimeMode(TorchDispatchMode):
    """A mode that looks at the tensors that there are, not at the operations that make them."""


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Where its values begin."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


@cache
def convolves() -> bool:
    """Whether :func:`small_conv2d` is there, and this processor has what it needs."""
    return library() is not None and bool(require_library().gconv_full_runs())


def small_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """An ordinary convolution of a channels-last map, without padding and stride, and ReLU of it if asked.

    Args:
        x: ``[N, I, H, W]``.
        weight: ``[k, k, I, O]``, O a multiple of eight.
        bias: ``[O]``, or None.
        relu: whether ReLU comes then, of which what is not a number stays so.
    """
    n, channels, height, width = x.shape
    k, out_channels = len(weight), weight.shape[3]
    y = x.new_empty((n, height - k + 1, width - k + 1, out_channels)).permute(0, 3, 1, 2)
    sizes = torch.get_num_threads(), n, channels, out_channels, k, height, width
    if n:
        launch("full", *sizes, *map(address, (x, weight, bias)), int(relu), address(y))
    return y


_FEW = 64  # output channels up to which it is used; benchmarks/speed_networks.py measures P4CNN, which has 40


def is_small(weight: Tensor, stride: int, padding: int, dilation: int) -> bool:
    """Whether a convolution with this filter ``[O, I, k, k]`` is one for :func:`small_conv2d`."""
    few = len(weight) <= _FEW and len(weight) % 8 == 0
    return few and (stride, padding, dilation) == (1, 0, 1) and convolves()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> Tensor:
    """``torch.nn.functional.conv2d``, of few channels by :func:`small_conv2d`; its gradients are PyTorch's."""
    # First, as a compiler is not to look into what follows.
    plain = not torch.compiler.is_compiling() and not torch.jit.is_tracing() and type(x) is Tensor  # type: ignore[attr-defined]
    fits = plain and is_small(weight, stride, padding, dilation) and is_supported(x, weight, bias)
    fits = fits and has_channels_last_strides(x)
    if not (fits and x.shape[1] == weight.shape[1] and min(x.shape[2:]) >= weight.shape[2]):
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _Convolution.apply(x, weight, bias)
        return y
    return small_conv2d(x, packed_filter(weight), bias, relu=False)


def packed_filter(weight: Tensor) -> Tensor:
    """``[O, I, k, k]`` as :func:`small_conv2d` takes it."""
    return weight.detach().permute(2, 3, 1, 0).contiguous()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = None if bias is None else list(bias.shape)
        return small_conv2d(x, packed_filter(weight), bias, relu=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            *gradients, x, weight, ctx.biased, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needed
        )
        return found


def norm(x: Tensor, factor: Tensor, offset: Tensor, relu: bool) -> Tensor:
    """``factor x + offset`` of a channels-last map, both ``[C]``, and ReLU of it if asked."""
    y = torch.empty_like(x)
    threads, positions, channels = torch.get_num_threads(), ctypes.c_size_t(x.numel() // x.shape[1]), x.shape[1]
    launch("norm", threads, positions, channels, *map(address, (x, factor, offset)), int(relu), address(y))
    return y


def norm_train(
    x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of a channels-last group-major map, and ReLU if asked; S values of a channel share its statistics.

    Returns:
        The map, and the mean and the variance (of n, not n - 1) of each channel.
    """
    found = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    given = (*map(address, (x, weight, bias)), ctypes.c_double(eps), int(relu))
    launch("norm_train", *_sizes(x, order), *given, *map(address, found))
    return found


def norm_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, var: Tensor, order: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`norm_train` for the map, the weight and the bias; y is its result if that had ReLU."""
    found = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    given = (*map(address, (grad, x, y, weight, mean, var)), ctypes.c_double(eps))
    launch("norm_backward", *_sizes(x, order), *given, *map(address, found))
    return found


def _sizes(x: Tensor, order: int) -> tuple[int, ctypes.c_size_t, int, int]:
    """Threads, positions, channels, and values of each."""
    return torch.get_num_threads(), ctypes.c_size_t(x.numel() // x.shape[1]), x.shape[1] // order, order
