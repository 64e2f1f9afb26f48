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
        x = to_planar(input)
        order = x.shape[1] // input.shape[1]
        if not (self.training or self.running_mean is None):
            mean, var, weight, bias = (
                of if of is None or order == 1 else of.repeat_interleave(order)
                for of in (self.running_mean, self.running_var, self.weight, self.bias)
            )
            y = F.batch_norm(x, mean, var, weight, bias, eps=self.eps)
        elif processes() > 1 or (order > 1 and _is_slow_natively(x)):
            y = self._normalised(x, order)
        else:
            return super().forward(input)
        return y.view(input.shape) if order == 1 else y.unflatten(1, input.shape[1:3])

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
    """Whether PyTorch's kernel for maps with a group axis is many times slower on this one: channels-last, on a CPU."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    return plain and is_channels_last(x) and not torch.compiler.is_compiling()


def _precision(x: Tensor) -> torch.dtype:
    """Of the statistics, as PyTorch has it: its own, but for half-precision maps single."""
    return torch.promote_types(x.dtype, torch.float32)


class _Normalise(torch.autograd.Function):
    """Batch norm of ``[N, C S, H, W]`` with statistics shared by the S maps of a channel and by all processes.

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
        per_map = (value.repeat_interleave(order) for value in (weight, bias, mean, var))
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
            size = (len(weight), order)
            y = F.batch_norm(x.unflatten(1, size), None, None, weight, bias, training=True, eps=eps)
            needed = [value for value in (x, weight, bias) if value.requires_grad]
            found = iter(torch.autograd.grad(y, needed, grad.unflatten(1, size), create_graph=True))
            return *(next(found) if value.requires_grad else None for value in (x, weight, bias)), None, None
        w, m, v = (value.repeat_interleave(order) for value in (weight, mean, var))
        # As if mean and variance were constants, and then what depends on x through them: a line in x for each map.
        dx, dw, db = _aten.native_batch_norm_backward(grad, x, w, m, v, None, None, False, eps, [True, True, True])
        dw, db = (value.view(-1, order).sum(1) for value in (dw, db))
        all_dw, all_db = sum_over_processes(torch.stack((dw, db))).repeat_interleave(order, 1)
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
    size = torch.tensor(n * order * height * width, dtype=torch.float64, device=x.device)
    mean = (share * means).sum(0).view(-1, order).mean(1)
    second = (share * (variances + (means - mean.repeat_interleave(order)).square())).sum(0).view(-1, order).mean(1)
    if processes() > 1:
        total = sum_over_processes(size.clone())
        joint = sum_over_processes(mean * size) / total
        second = sum_over_processes((second + (mean - joint).square()) * size) / total
        mean, size = joint, total
    return mean.to(_precision(x)), second.to(_precision(x)), int(size)
