"""Batch normalisation on group feature maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.functional.expansion import (
    from_group_major,
    has_channels_last_strides,
    is_strictly_channels_last,
    to_group_major,
)
from gconv.functional.expansion import relu as relu_of
from gconv.kernels.batch_norm import norm, norm_backward, norm_train
from gconv.kernels.library import is_supported
from gconv.system.distributed import processes, sum_over_processes
from gconv.system.errors import InputError

from .symbolic import is_traced_alone, node_of

_aten = torch.ops.aten


class GroupBatchNorm2d(_BatchNorm):
    """Batch norm with one mean, variance, weight and bias per channel, shared over the group axis and the plane.

    It is equivariant because the group axis shares them. Input and output are ``[N, C, S, H, W]`` or planar
    ``[N, C, H, W]``. Arguments, parameters and state dict are those of ``nn.BatchNorm2d``. When ``torch.distributed``
    is initialised, the statistics are those of the batches of all processes together.
    """

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """The normalised map.

        Args:
            input: ``[N, C, S, H, W]`` or ``[N, C, H, W]``.
            relu: whether to apply ReLU too. In training this takes fewer passes over memory than a ReLU afterwards.

        Raises:
            InputError: the input has another number of axes.
            ValueError: a single value per channel in training, as for ``nn.BatchNorm2d``.
        """
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            return self._node(input, relu)
        if input.dim() not in (4, 5):
            accepted = "[N, C, S, H, W] or [N, C, H, W]"
            raise InputError(f"GroupBatchNorm2d got an input of shape {list(input.shape)}; accepted: {accepted}")
        x = to_group_major(input)
        order = x.shape[1] // input.shape[1]
        if not (self.training or self.running_mean is None):
            y = self._eval_forward(x, order, relu)
        elif order > 1 and x.is_cuda and processes() == 1 and not torch.compiler.is_compiling():
            y = _planar(super().forward(_elements_as_images(x, order)), x)
            y = relu_of(y) if relu else y
        elif processes() > 1 or (order > 1 and _is_slow_natively(input)):
            y = self._normalised(x, order, relu)
        else:
            y = super().forward(input)
            return relu_of(y) if relu else y
        return y.view(input.shape) if order == 1 else from_group_major(y, order)

    def _node(self, x: Any, relu: Any) -> Any:
        """The layer in a graph of ``torch.fx``."""
        if is_traced_alone(self, x):
            raise InputError("torch.fx traces a GroupBatchNorm2d only inside a network; trace an nn.Sequential of it")
        overridden = type(self).forward is not GroupBatchNorm2d.forward
        return node_of(self, x, _forward_without_hooks, overridden, relu=relu)

    def _eval_forward(self, x: Tensor, order: int, relu: bool) -> Tensor:
        """Normalise with the running statistics."""
        assert self.running_mean is not None and self.running_var is not None
        given = self.weight, self.bias, self.running_mean, self.running_var
        plain = type(x) is Tensor and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        plain = plain and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        if plain and _is_compiled(x, order, *given):
            factor = self.weight * (self.running_var + self.eps).rsqrt()
            offset = torch.addcmul(self.bias, factor, self.running_mean, value=-1)
            factors, offsets = _of_maps((factor, offset), order)
            return norm(x, factors, offsets, relu)
        weight, bias, mean, var = (of if of is None or order == 1 else of.repeat(order) for of in given)
        y = F.batch_norm(x, mean, var, weight, bias, eps=self.eps)
        return relu_of(y) if relu else y

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # done in forward

    def _normalised(self, x: Tensor, order: int, relu: bool) -> Tensor:
        channels = x.shape[1] // order
        weight = x.new_ones(channels, dtype=_precision(x)) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        if not (x.is_contiguous() or is_strictly_channels_last(x)):
            x = x.contiguous()
        normalise = _normalise if torch.compiler.is_compiling() else _Normalise.apply
        y, mean, var, count = normalise(x, weight, bias, order, self.eps, relu)
        if self.training and self.running_mean is not None:
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return y


def _forward_without_hooks(layer: GroupBatchNorm2d, x: Tensor, relu: bool = False) -> Tensor:
    return GroupBatchNorm2d.forward(layer, x, relu)


def _elements_as_images(x: Tensor, order: int) -> Tensor:
    """Group-major ``[N, S C, H, W]`` as ``[N S, C, H, W]``, or as ``[N H W S, C]`` if it is channels-last; a view.

    The batch norm of PyTorch is fast on this layout on a GPU. On a CPU it is not.
    """
    if x.stride(1) == 1:
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // order)
    return x.unflatten(1, (order, -1)).flatten(0, 1)


def _planar(y: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_elements_as_images`, in the shape of ``like``."""
    n, c, h, w = like.shape
    return y.view(n, h, w, c).permute(0, 3, 1, 2) if y.dim() == 2 else y.view(n, c, h, w)


def _is_slow_natively(x: Tensor) -> bool:
    """Whether PyTorch's kernel for maps of five axes would copy this one first, as it does with group-major maps.

    For channels-last maps on a CPU that kernel is also many times slower. Compilers assume another memory format for
    its output than it has, so under them it counts as slow.
    """
    return torch.compiler.is_compiling() or (type(x) is Tensor and not x.is_contiguous())


def _precision(x: Tensor) -> torch.dtype:
    """The type of the statistics, as in PyTorch: that of the map, but float32 for maps in half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same as :class:`_Normalise` in one process, in operations that compilers know and fuse."""
    maps = x.unflatten(1, (order, -1))
    var, mean = torch.var_mean(maps.to(_precision(x)), (0, 1, 3, 4), correction=0)
    shape = (1, 1, -1, 1, 1)
    y = (maps - mean.view(shape)) * (weight * (var + eps).rsqrt()).view(shape) + bias.view(shape)
    y = y.to(x.dtype).flatten(1, 2)
    return F.relu(y) if relu else y, mean.detach(), var.detach(), x.numel() // len(mean)


class _Normalise(torch.autograd.Function):
    """Batch norm of group-major ``[N, S C, H, W]``, and ReLU if asked. S maps, and all processes, share statistics.

    On a CPU most of the time goes into passes over the maps and into new memory for them. So compiled functions, or
    else suitable operations of PyTorch, do it with few passes and little memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        compiled = processes() == 1 and _is_compiled(x, order, weight, bias)
        count = x.numel() // weight.numel()
        if compiled and count > 1:
            y, mean, var = norm_train(x, weight, bias, order, eps, relu)
        else:
            mean, var, count = _statistics(x, order)
            if count <= 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"
                )
            y = _aten.native_batch_norm(x, *_of_maps((weight, bias, mean, var), order), False, 0.0, eps)[0]
            if relu:
                y.relu_()
        ctx.save_for_backward(x, weight, bias, mean, var, y if relu else None)
        ctx.order, ctx.eps, ctx.count, ctx.compiled = order, eps, count, compiled
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, y = ctx.saved_tensors
        order, eps, count = ctx.order, ctx.eps, ctx.count
        if torch.is_grad_enabled():  # a second derivative is wanted, which PyTorch's batch norm has
            if processes() > 1:
                raise InputError("batch norm has no second derivatives in a distributed run")
            again = F.batch_norm(from_group_major(x, order), None, None, weight, bias, training=True, eps=eps)
            again = again if y is None else F.relu(again)
            needed = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(again, needed, from_group_major(grad, order), create_graph=True))
            return *(next(found) if value.requires_grad else None for value in (x, weight, bias)), None, None, None
        if ctx.compiled:
            grad = grad.contiguous(memory_format=torch.channels_last)
            return *norm_backward(grad, x, y, weight, mean, var, order, eps), None, None, None
        grad = grad if y is None else _aten.threshold_backward(grad, y, 0)
        dw, db = sums = _sums(grad, x, mean, var, order, eps)
        total = sum_over_processes(sums.clone())
        # The gradient for constant mean and variance is a multiple of grad. Their dependence on x adds a function
        # slope x + offset for each map.
        inverse = (var + eps).rsqrt()
        factor = weight * inverse
        slope, offset = (total * (factor / -count)).to(mean.dtype)
        slope = slope * inverse
        offset = torch.addcmul(offset, slope, mean, value=-1)
        zero, one = torch.zeros_like(var), torch.ones_like(var)
        *line, factor = _of_maps((slope, offset, zero, one, factor), order)
        dx = _aten.native_batch_norm(x, *line, False, 0.0, 0.0)[0]
        dx.addcmul_(grad, factor.to(x.dtype).view(1, -1, 1, 1))
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None, None


_CHUNK = 1 << 14
"""So many values of a map are summed at once, because the kernels add them in single precision one after the other."""


def _of_maps(values: tuple[Tensor, ...], order: int) -> tuple[Tensor, ...]:
    """Values of the channels ``[C]``, repeated for the S maps of each channel: ``[S C]``."""
    return torch.stack(values).repeat(1, order).unbind()


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _CHUNK // (x.shape[2] * x.shape[3])))


def _is_compiled(x: Tensor, order: int, *parameters: Tensor | None) -> bool:
    """Whether the compiled functions support this map and its parameters, each ``[C]``."""
    usual = is_supported(x, *parameters) and has_channels_last_strides(x)
    return usual and all(of is not None and order * len(of) == x.shape[1] for of in parameters)


def _sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, order: int, eps: float) -> Tensor:
    """The gradients of weight and bias, ``[2, C]`` in double precision: sums over the S maps of every channel."""
    statistics = _of_maps((mean, var), order)
    found = [
        _aten.native_batch_norm_backward(*parts, None, *statistics, None, None, False, eps, (False, True, True))[1:]
        for parts in zip(_chunks(grad), _chunks(x), strict=True)
    ]
    both = torch.cat([torch.cat(sums) for sums in zip(*found, strict=True)])
    return both.view(2, -1, x.shape[1] // order).sum(1, dtype=torch.float64)


def _statistics(x: Tensor, order: int) -> tuple[Tensor, Tensor, int]:
    """Mean and variance (of n, not n - 1) of the S maps of every channel over all processes, and the count n."""
    n, _, height, width = x.shape
    parts = _chunks(x)
    found = [_aten.batch_norm_update_stats(part.to(_precision(x)), None, None, 0.0) for part in parts]
    # One row for each chunk and element, weighted by its share of all values.
    channels = x.shape[1] // order
    means, variances = (torch.cat(values).view(-1, channels).double() for values in zip(*found, strict=True))
    shares = [len(part) / (n * order) for part in parts for _ in range(order)]
    share = torch.tensor(shares, dtype=means.dtype, device=means.device)
    # Variances about different means cannot be averaged, second moments about a common point can.
    mean = share @ means
    second = share @ (variances + (means - mean).square())
    count = n * order * height * width
    if processes() > 1:
        size = torch.tensor(count, dtype=torch.float64, device=x.device)
        total = sum_over_processes(size.clone())
        joint = sum_over_processes(mean * size) / total
        second = sum_over_processes((second + (mean - joint).square()) * size) / total
        mean, count = joint, int(total)
    return mean.to(_precision(x)), second.to(_precision(x)), count
