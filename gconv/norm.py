"""Batch normalisation on group feature maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import processes, sum_over_processes
from .errors import InputError
from .functional import is_channels_last, to_planar
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
        x = to_planar(input)
        order = x.shape[1] // input.shape[1]
        if not (self.training or self.running_mean is None):
            mean, var, weight, bias = (
                of if of is None or order == 1 else of.repeat_interleave(order)
                for of in (self.running_mean, self.running_var, self.weight, self.bias)
            )
            y = F.batch_norm(x, mean, var, weight, bias, eps=self.eps)
            y = relu_of(y) if relu else y
        elif processes() > 1 or (order > 1 and _is_slow_natively(x)):
            y = self._normalised(x, order, relu)
        else:
            y = super().forward(input)
            return relu_of(y) if relu else y
        return y.view(input.shape) if order == 1 else y.unflatten(1, input.shape[1:3])

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # done in forward

    def _normalised(self, x: Tensor, order: int, relu: bool) -> Tensor:
        channels = x.shape[1] // order
        weight = x.new_ones(channels, dtype=_precision(x)) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        if not (x.is_contiguous() or is_channels_last(x)):
            x = x.contiguous()
        y, mean, var, count = _Normalise.apply(x, weight, bias, order, self.eps, relu)
        if self.training and self.running_mean is not None:
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return y


def _is_slow_natively(x: Tensor) -> bool:
    """Whether PyTorch's kernel for maps with a group axis is many times slower on this one: channels-last, on a CPU."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    return plain and is_channels_last(x) and not torch.compiler.is_compiling()


def _precision(x: Tensor) -> torch.dtype:
    """Of the statistics, as PyTorch has it: its own, but for half-precision maps single."""
    return torch.promote_types(x.dtype, torch.float32)


class _Normalise(torch.autograd.Function):
    """Batch norm of ``[N, C S, H, W]``, and ReLU if asked, with statistics shared by S maps and by all processes.

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
        per_map = (value.repeat_interleave(order) for value in (weight, bias, mean, var))
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
            size = (len(weight), order)
            again = F.batch_norm(x.unflatten(1, size), None, None, weight, bias, training=True, eps=eps)
            again = again if y is None else F.relu(again)
            needed = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(again, needed, grad.unflatten(1, size), create_graph=True))
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
            return values.repeat_interleave(self.order).repeat(self.pixels)
        return values.repeat_interleave(self.order * self.pixels)

    def sums(self, rows: Tensor) -> Tensor:
        """Of each channel, over all rows."""
        total = rows.new_ones(len(rows)) @ rows
        if self.last:
            return total.view(self.pixels, self.channels, self.order).sum((0, 2))
        return total.view(self.channels, -1).sum(1)


def _statistics(x: Tensor, order: int) -> tuple[Tensor, Tensor, int]:
    """Mean and variance (of n, not n - 1) of the S maps of every channel over all processes, and the count n."""
    n, height, width = len(x), *x.shape[2:]
    parts = x.split(max(1, _CHUNK // (height * width)))
    found = [_aten.batch_norm_update_stats(part.to(_precision(x)), None, None, 0.0) for part in parts]
    means, variances = (torch.stack(values).double() for values in zip(*found, strict=True))
    share = torch.tensor([len(part) / n for part in parts], dtype=torch.float64, device=x.device)[:, None]
    # Of the chunks and of the S maps, then of the processes; by way of the second moment about a common point.
    size = torch.tensor(n * order * height * width, dtype=torch.float64, device=x.device)
    mean = (share * means).sum(0).view(-1, order).mean(1)
    second = (share * (variances + (means - mean.repeat_interleave(order)).square())).sum(0).view(-1, order).mean(1)
    if processes() > 1:
        total = sum_over_processes(size.clone())
        joint = sum_over_processes(mean * size) / total
        second = sum_over_processes((second + (mean - joint).square()) * size) / total
        mean, size = joint, total
    return mean.to(_precision(x)), second.to(_precision(x)), int(size)
