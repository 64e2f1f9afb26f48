"""What ``execution="auto"`` of a separable layer stands for.

The execution belongs to the machine that a layer runs on, not to the layer. In the compiled kernel, mixing in the
irreducible representations of the group is faster from few channels on, and from how many depends on the instruction
set. In PyTorch's operations it takes many more channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gconv.functional.expansion import Sampling
from gconv.functional.form_base import Execution, FilterShape, Form
from gconv.functional.mixing import basis_of
from gconv.groups.point_groups import Group
from gconv.kernels.dispatch import Sizes, in_basis_pays, is_supported_size
from gconv.kernels.library import kernel_class


def kernel_for(parameter: Tensor) -> str:
    """The class of machines whose rule holds here for a layer with such parameters.

    It is this machine's on a CPU in single precision. The compiled kernel runs no other layers, so for them it is
    ``none``.
    """
    return kernel_class() if parameter.is_cpu and parameter.dtype is torch.float32 else "none"


def auto_execution(
    form: Form, group: Group, shape: FilterShape, rank: int, sampling: Sampling, kernel: str
) -> Execution:
    """How a separable layer runs under ``auto``.

    Args:
        form: the layer's form.
        group: its group.
        shape: of its generator.
        rank: its rank.
        sampling: its stride, padding and dilation.
        kernel: the class of the machine, one of :data:`gconv.kernels.dispatch.KERNELS`; ``none`` gives the rule for
            PyTorch's operations.

    Raises:
        InputError: there is no such class.
    """
    o, i, s, k = shape
    pays = in_basis_pays(group, o, i, sampling.stride, kernel)
    if pays is None or not is_supported_size(Sizes(s, i, o, rank, form.spatial_first, k, *sampling)):
        pays = basis_of(group).pays(o, i)
    return "irrep" if pays and "irrep" in form.executions else form.default_execution
