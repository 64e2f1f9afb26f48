"""Batch normalisation on group feature maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import processes, sum_over_processes
from .errors import InputError
from .functional import from_group_major, is_channels_last, to_group_major
from .functional import relu as relu_of

_aten = torch.ops.aten


class GroupBatchNorm2d(_BatchNorm):
    """Batch norm with one mean, variance and affine pair per channel, shared over the group axis and the plane.

    Sharing over the group axis is what keeps it equivariant. Input and output ``[N, C, S, H, W]`` or planar
    ``[N, C, H, W]``. Arguments, parameters and state dict as ``nn.BatchNorm2d``. In a distributed run
    (``torch.distributed`` is initialised) the statistics are those of the batches of all processes together.
    """

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """The normalised map; with ``relu`` the ReLU of it, which in training takes fewer passes over memory.

        Raises:
            InputError: the input is not a map.
            ValueError: as of ``nn.BatchNorm2d``, in training on a single value per channel.
        """
        if input.dim() not in (4, 5):
            raise InputError(f"GroupBatchNorm2d got an input of shape {list(input.shape)}; accepted: [N, C, S, H, W]")
        x = to_group_major(input)
        order = x.shape[1] // input.shape[1]
        if not (self.training or self.running_mean is None):
            mean, var, weight, bias = (
                of if of is None or order == 1 else of.repeat(order)
                for of in (self.running_mean, self.running_var, self.weight, self.bias)
            )
            y = F.batch_norm(x, mean, var, weight, bias, eps=self.eps)
            y = relu_of(y) if relu else y
        elif processes() > 1 or (order > 1 and _is_slow_natively(input)):
            y = self._normalised(x, order, relu)
        else:
            y = super().forward(input)
            return relu_of(y) if relu else y
        return y.view(input.shape) if order == 1 else from_group_major(y, order)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # done in forward

    def _normalised(self, x: Tensor, order: int, relu: bool) -> Tensor:
        channels = x.shape[1] // order
        weight = x.new_ones(channels, dtype=_precision(x)) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        if not (x.is_contiguous() or is_channels_last(x)):
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


def _is_slow_natively(x: Tensor) -> bool:
    """Whether PyTorch's kernel for maps with a group axis would copy this one first: the layers' are group-major.

    Channels-last, on a CPU, it is many times slower besides; and compilers are told wrongly in which order the native
    kernel leaves such a map.
    """
    return torch.compiler.is_compiling() or (type(x) is Tensor and not x.is_contiguous())


def _precision(x: Tensor) -> torch.dtype:
    """Of the statistics, as PyTorch has it: its own, but for half-precision maps single."""
    return torch.promote_types(x.dtype, torch.float32)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """What :class:`_Normalise` does in one process, in operations that compilers know and fuse."""
    maps = x.unflatten(1, (order, -1))
    var, mean = torch.var_mean(maps.to(_precision(x)), (0, 1, 3, 4), correction=0)
    shape = (1, 1, -1, 1, 1)
    y = (maps - mean.view(shape)) * (weight * (var + eps).rsqrt()).view(shape) + bias.view(shape)
    y = y.to(x.dtype).flatten(1, 2)
    return F.relu(y) if relu else y, mean.detach(), var.detach(), x.numel() // len(mean)


class _Normalise(torch.autograd.Function):
    """Batch norm of group-major ``[N, S C, H, W]``, and ReLU if asked; S maps, and all processes, share statistics.

    On a CPU the time goes into passes over the maps, so there are as few as PyTorch's operations allow. Sums over
    pixels are matrix products, which read the maps as fast as memory gives them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(x, order)
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        per_map = (value.repeat(order) for value in (weight, bias, mean, var))
        y = _aten.native_batch_norm(x, *per_map, False, 0.0, eps)[0]
        if relu:
            y.relu_()
        ctx.save_for_backward(x, weight, bias, mean, var, y if relu else None)
        ctx.order, ctx.eps, ctx.count = order, eps, count
        total = mean.new_tensor(count)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, y = ctx.saved_tensors
        order, eps, count = ctx.order, ctx.eps, ctx.count
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for: the native operation has one
            if processes() > 1:
                raise InputError("batch norm has no second derivatives in a distributed run")
            again = F.batch_norm(from_group_major(x, order), None, None, weight, bias, training=True, eps=eps)
            again = again if y is None else F.relu(again)
            needed = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(again, needed, from_group_major(grad, order), create_graph=True))
            return *(next(found) if value.requires_grad else None for value in (x, weight, bias)), None, None, None
        rows = _Rows(x, order)
        grad = grad if y is None else _aten.threshold_backward(grad, y, 0)
        flat, above = (rows.of(value).to(mean.dtype) for value in (x, grad))
        inverse = (var + eps).rsqrt()
        # A mean far from zero would leave nothing of the sum of products but rounding.
        far = bool(((mean * inverse).abs() > _FAR).any())
        product = (flat - rows.columns(mean)).mul_(above) if far else flat * above
        db, dw = rows.sums(above), rows.sums(product)
        dw = (dw if far else dw - mean * db) * inverse
        all_db, all_dw = sum_over_processes(torch.stack((db, dw)))
        # As if mean and variance were constants, and then what depends on x through them: a line in x for each map.
        factor = weight * inverse
        slope = -factor * inverse * all_dw / count
        offset = -factor * all_db / count - slope * mean
        scale, slope, offset = (rows.columns(value) for value in (factor, slope, offset))
        dx = torch.empty_like(x)
        torch.addcmul(torch.addcmul(offset, flat, slope, out=product), above, scale, out=rows.of(dx))
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None, None


_FAR = 16
"""Standard deviations."""

_CHUNK = 1 << 14
"""Values of a map that are summed in one go: the kernels add up in single precision, one after the other."""


class _Rows:
    """Planar maps as matrices: each row has a line of pixels with all channels of each, if they lie so in memory, else
    all pixels of all channels."""

    def __init__(self, x: Tensor, order: int) -> None:
        _, maps, height, width = x.shape
        self.order, self.channels = order, maps // order
        self.last = is_channels_last(x)
        self.pixels = width if self.last else height * width

    def of(self, x: Tensor) -> Tensor:
        """The matrix ``[rows, columns]``; a view, if the memory format is that of the maps given first."""
        return (x.permute(0, 2, 3, 1) if self.last else x).reshape(-1, self.channels * self.order * self.pixels)

    def columns(self, values: Tensor) -> Tensor:
        """The value of each column's channel."""
        if self.last:
            return values.repeat(self.order * self.pixels)
        return values.repeat_interleave(self.pixels).repeat(self.order)

    def sums(self, rows: Tensor) -> Tensor:
        """Of each channel, over all rows."""
        total = rows.new_ones(len(rows)) @ rows
        if self.last:
            return total.view(-1, self.channels).sum(0)
        return total.view(self.order, self.channels, self.pixels).sum((0, 2))


def _statistics(x: Tensor, order: int) -> tuple[Tensor, Tensor, int]:
    """Mean and variance (of n, not n - 1) of the S maps of every channel over all processes, and the count n."""
    n, height, width = len(x), *x.shape[2:]
    parts = x.split(max(1, _CHUNK // (height * width)))
    found = [_aten.batch_norm_update_stats(part.to(_precision(x)), None, None, 0.0) for part in parts]
    means, variances = (torch.stack(values).double() for values in zip(*found, strict=True))
    share = torch.tensor([len(part) / n for part in parts], dtype=torch.float64, device=x.device)[:, None]
    # Of the chunks and of the S maps, then of the processes; by way of the second moment about a common point.
    count = n * order * height * width
    mean = (share * means).sum(0).view(order, -1).mean(0)
    second = (share * (variances + (means - mean.repeat(order)).square())).sum(0).view(order, -1).mean(0)
    if processes() > 1:
        size = torch.tensor(count, dtype=torch.float64, device=x.device)
        total = sum_over_processes(size.clone())
        joint = sum_over_processes(mean * size) / total
        second = sum_over_processes((second + (mean - joint).square()) * size) / total
        mean, count = joint, int(total)
    return mean.to(_precision(x)), second.to(_precision(x)), count
