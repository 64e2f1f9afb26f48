"""Batch normalisation on group feature maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import processes, sum_over_processes
from .errors import InputError
from .functional import from_group_major, to_group_major

_aten = torch.ops.aten


class GroupBatchNorm2d(_BatchNorm):
    """Batch norm with one mean, variance and affine pair per channel, shared over the group axis and the plane.

    Sharing over the group axis is what keeps it equivariant. Input and output ``[N, C, S, H, W]`` or planar
    ``[N, C, H, W]``. Arguments, parameters and state dict as ``nn.BatchNorm2d``. In a distributed run
    (``torch.distributed`` is initialised) the statistics are those of the batches of all processes together.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The normalised map.

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
        elif processes() > 1 or (order > 1 and _is_slow_natively(input)):
            y = self._normalised(x, order)
        else:
            return super().forward(input)
        return y.view(input.shape) if order == 1 else from_group_major(y, order)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # done in forward

    def _normalised(self, x: Tensor, order: int) -> Tensor:
        channels = x.shape[1] // order
        weight = x.new_ones(channels, dtype=_precision(x)) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        y, mean, var, count = _Normalise.apply(x, weight, bias, order, self.eps)
        if self.training and self.running_mean is not None:
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return y


def _is_slow_natively(x: Tensor) -> bool:
    """Whether PyTorch's kernel for maps with a group axis would copy this one first: the layers' are group-major.

    Channels-last, on a CPU, it is many times slower besides.
    """
    return type(x) is Tensor and not x.is_contiguous() and not torch.compiler.is_compiling()


def _precision(x: Tensor) -> torch.dtype:
    """Of the statistics, as PyTorch has it: its own, but for half-precision maps single."""
    return torch.promote_types(x.dtype, torch.float32)


class _Normalise(torch.autograd.Function):
    """Batch norm of group-major ``[N, S C, H, W]``; the S maps of a channel, and all processes, share statistics.

    Made of PyTorch's kernels for one statistic a map, which are fast in both memory formats.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(x, order)
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.order, ctx.eps, ctx.count = order, eps, count
        per_map = (value.repeat(order) for value in (weight, bias, mean, var))
        y = _aten.native_batch_norm(x, *per_map, False, 0.0, eps)[0]
        total = mean.new_tensor(count)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        order, eps, count = ctx.order, ctx.eps, ctx.count
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for: the native operation has one
            if processes() > 1:
                raise InputError("batch norm has no second derivatives in a distributed run")
            y = F.batch_norm(from_group_major(x, order), None, None, weight, bias, training=True, eps=eps)
            needed = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(y, needed, from_group_major(grad, order), create_graph=True))
            return *(next(found) if value.requires_grad else None for value in (x, weight, bias)), None, None
        w, m, v = (value.repeat(order) for value in (weight, mean, var))
        # As if mean and variance were constants, and then what depends on x through them: a line in x for each map.
        dx, dw, db = _aten.native_batch_norm_backward(grad, x, w, m, v, None, None, False, eps, [True, True, True])
        dw, db = (value.view(order, -1).sum(0) for value in (dw, db))
        all_dw, all_db = sum_over_processes(torch.stack((dw, db))).repeat(1, order)
        inverse = (v + eps).rsqrt()
        slope = -w * inverse.square() * all_dw / count
        offset = -w * inverse * all_db / count - slope * m
        slope, offset = (value.to(x.dtype).view(1, -1, 1, 1) for value in (slope, offset))
        return dx.addcmul_(x, slope).add_(offset), dw, db, None, None


_CHUNK = 4096
"""Values of a map that are summed in one go: the kernels add up in single precision, one after the other."""


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
