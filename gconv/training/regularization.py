"""A penalty on full filters that pulls them towards separable ones, so that less is lost when they are converted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gconv.functional.form_base import Form
from gconv.functional.forms import form_named
from gconv.nn.conv import GConv2d


def rank1_residual(model: nn.Module, form: str | Form) -> Tensor:
    """The share of the filters' energy that a rank-1 filter of a form cannot have, averaged over the layers.

    A form folds the generator of a layer into blocks ``M_b``. The share of the layer is ``1 - sum_b s_1(M_b)^2 /
    sum_b |M_b|^2``, where ``s_1`` is the largest singular value. That is the squared relative error of the best rank-1
    approximation of every block (Eckart & Young, 1936). It is 0 for a separable layer, does not depend on the scale of
    the filters, and is differentiable.

    Args:
        model: a network. Its full group-to-group layers with kernels larger than 1 x 1 count.
        form: one of ``gconv.FORMS``.

    Returns:
        A scalar in [0, 1); 0 if no layer counts.

    Raises:
        InputError: an unknown form.
    """
    form = form_named(form)
    tails = []
    for layer in model.modules():
        if isinstance(layer, GConv2d) and layer.kernel_size[0] > 1:
            blocks = form.fold(layer.weight, layer.tables.pixels)
            # Eigenvalues of the smaller Gram matrix are faster than singular values, and exact enough for a penalty.
            tall = blocks if blocks.shape[1] >= blocks.shape[2] else blocks.mT
            largest = torch.linalg.eigvalsh(tall.mT @ tall)[:, -1]
            tails.append(1 - largest.sum() / blocks.square().sum())
    like = next(model.parameters())
    return torch.stack(tails).mean() if tails else like.new_zeros(())
