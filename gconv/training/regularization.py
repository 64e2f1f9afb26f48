"""A penalty in training that pulls full filters towards separable ones, so that converting them loses less."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gconv.functional.form_base import Form
from gconv.functional.forms import form_named
from gconv.nn.conv import GConv2d


def rank1_residual(model: nn.Module, form: str | Form) -> Tensor:
    """The share of the filters' energy that rank 1 of a form leaves out, averaged over the layers; differentiable.

    Of a layer whose generator folds into the blocks ``M_b`` it is ``1 - sum_b s_1(M_b)^2 / sum_b |M_b|^2``, where s_1
    is the largest singular value: the squared relative error of the best rank-1 approximation of every block (Eckart &
    Young, 1936), from 0 for a separable layer. It does not depend on the filters' scale.

    Args:
        model: a network; its full group-to-group layers with kernels larger than 1 x 1 count. Zero if it has none.
        form: one of ``gconv.FORMS``.

    Raises:
        InputError: an unknown form.
    """
    form = form_named(form)
    tails = []
    for layer in model.modules():
        if isinstance(layer, GConv2d) and layer.kernel_size[0] > 1:
            blocks = form.fold(layer.weight, layer.tables.pixels)
            # Eigenvalues of the smaller Gram matrix: as exact as is needed here, and faster than singular values.
            tall = blocks if blocks.shape[1] >= blocks.shape[2] else blocks.mT
            largest = torch.linalg.eigvalsh(tall.mT @ tall)[:, -1]
            tails.append(1 - largest.sum() / blocks.square().sum())
    like = next(model.parameters())
    return torch.stack(tails).mean() if tails else like.new_zeros(())
