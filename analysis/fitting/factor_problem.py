"""The least-squares problem of the two factors of a separable filter (:mod:`analysis.fitting.alternating`)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from gconv.functional.form_base import Form
from gconv.functional.forms import FORMS
from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d

from .conjugate_gradients import block_solver, conjugate_gradients
from .moments import Moments

FLOOR = 1e-10
"""Relative to the largest eigenvalue of M: a direction whose eigenvalue is below this holds nothing but rounding."""
_LEAST_WEIGHT = 1e-2  # relative to the mean: the estimated weight may be wrong, so no channel is ignored


class FactorProblem:
    """The squared output error J of a filter, its prior included, and the steps that lower it in one factor.

    Everything is in the frame of the form, where a filter is ``[O, I, S, Y]`` with Y = k k. Its factors are
    W ``[O, I, R, S]`` and D ``[O or 1, I or 1, R, Y]``: an axis of D has size 1 where the form shares D over it.

    ``solve_mix`` and ``solve_spatial`` find the best factor by the normal equations. ``improve_mix`` and
    ``improve_spatial`` take some steps of conjugate gradients instead: these need products with M alone.

    Args:
        layer: the trained layer.
        form: of the separable filter.
        moments: of the layer's input and wanted output; covariances where the layer has a bias.
        prior: the weight of staying near the trained filter, relative to the mean eigenvalue of M.
        weights: ``[O]``, what an error in each output channel costs; None: each channel relative to its own power.
        gradients: steps of conjugate gradients in one improvement.
    """

    def __init__(
        self,
        layer: GConv2d | SeparableGConv2d,
        form: Form,
        moments: Moments,
        *,
        prior: float,
        weights: Tensor | None = None,
        gradients: int = 10,
    ) -> None:
        self.gradients = gradients
        self.form, self.shape, self.pixels = form, layer.filter_shape, layer.tables.pixels
        o, i, s, k = self.shape
        self.sizes = (i, s, k * k)
        weight = layer.weight.detach().double()
        ridge = prior * moments.second.diagonal().mean()
        power = moments.power + ridge * weight.flatten(1).square().sum(1)
        if weights is None:
            # J = sum_o scale_o² J_o. With these scales every channel has the same power.
            self.scale = _floored(power, FLOOR * power.max()).rsqrt()
        else:
            weights = weights.to(power)
            self.scale = _floored(weights, _LEAST_WEIGHT * weights.mean()).sqrt()
        index = torch.arange(weight[0].numel(), device=weight.device).reshape(1, i, s, k, k)
        self.order = FORMS["g_turned" if form.input_frame else "g"].fold(index, self.pixels).flatten()
        second = moments.second[self.order][:, self.order].clone()
        second.diagonal().add_(ridge)
        self.second = second
        self.weight = self.frame(weight)
        self.cross = moments.cross[:, self.order].view(o, i, s, -1) + ridge * self.weight
        self.power = power

    @cached_property
    def by_channels(self) -> Tensor:
        """M as ``[I, I, S S, Y Y]``."""
        i, s, y = self.sizes
        return self.second.view(i, s, y, i, s, y).permute(0, 3, 1, 4, 2, 5).reshape(i, i, s * s, -1)

    def frame(self, weight: Tensor) -> Tensor:
        """``[O, I, S, k, k]`` to ``[O, I, S, Y]`` in the form's frame."""
        o, i, s, _ = self.shape
        return weight.reshape(o, -1)[:, self.order].view(o, i, s, -1)

    def unframe(self, filter_: Tensor) -> Tensor:
        """The inverse of :meth:`frame`."""
        return filter_.flatten(1)[:, torch.argsort(self.order)].view(*self.shape, self.shape.k)

    def split(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """W and D of the truncated SVD of a filter ``[O, I, S, k, k]``."""
        mix, spatial = self.form.factor(weight, rank, self.pixels)
        if self.form.block_axes == "oi":
            return mix, spatial.flatten(3)
        if self.form.block_axes == "o":
            return mix.transpose(1, 2), spatial.flatten(2)[:, None]
        return mix.permute(2, 0, 1, 3), spatial.flatten(2)[None]

    @staticmethod
    def product(w: Tensor, d: Tensor) -> Tensor:
        """The filter ``[O, I, S, Y]`` of two factors."""
        return w.mT @ d

    def objective(self, filter_: Tensor) -> float:
        """J of a filter ``[O, I, S, Y]``, summed over the output channels."""
        flat, cross = filter_.flatten(1), self.cross.flatten(1)
        errors = ((flat @ self.second - 2 * cross) * flat).sum(1) + self.power
        return float((errors * self.scale.square()).sum())

    def solve_mix(self, d: Tensor) -> Tensor:
        """The best W for this D.

        There is one problem of size I R S for each o. All of them have the same matrix if D is shared over o.
        """
        i, s, y = self.sizes
        o, rank = self.shape.out_channels, d.shape[2]
        right = torch.einsum("oiry,oisy->oirs", d.expand(o, i, rank, y), self.cross).flatten(1)
        size = i * rank * s
        if d.shape[0] == 1:
            matrix = self._normal_mix(d[0])
            return _solve(matrix, right.mT).mT.reshape(o, i, rank, s)
        return torch.stack([_solve(self._normal_mix(d[c]), right[c].view(size, 1)).view(i, rank, s) for c in range(o)])

    def _normal_mix(self, d: Tensor) -> Tensor:
        """The matrix ``[I R S, I R S]`` of the normal equations for one o; d is ``[I or 1, R, Y]``."""
        i, s, y = self.sizes
        rank = d.shape[1]
        pairs = torch.einsum("iry,jqz->ijrqyz", d, d).reshape(len(d), len(d), rank * rank, y * y)
        normal = (pairs @ self.by_channels.mT).view(i, i, rank, rank, s, s)
        return normal.permute(0, 2, 4, 1, 3, 5).reshape(i * rank * s, -1)

    def solve_spatial(self, w: Tensor) -> Tensor:
        """The best D for this W, shared over the axes that the form shares it over."""
        i, s, y = self.sizes
        o, _, rank, _ = w.shape
        right = torch.einsum("oirs,oisy->oiry", w, self.cross)
        if self.form.block_axes == "i":  # D is shared over o; each o counts by its scale
            scaled = w * self.scale.view(-1, 1, 1, 1)
            gram = torch.einsum("oirs,ojqt->ijrqst", scaled, scaled).reshape(i, i, rank * rank, s * s)
            normal = self._spatial_matrix(gram @ self.by_channels, rank)
            total = (right * self.scale.square().view(-1, 1, 1, 1)).sum(0)
            return _solve(normal, total.reshape(-1, 1)).view(1, i, rank, y)
        solved = []
        for c in range(o):
            pairs = torch.einsum("irs,jqt->ijrqst", w[c], w[c]).reshape(i, i, rank * rank, s * s)
            normal = pairs @ self.by_channels
            if self.form.block_axes == "o":  # D is shared over i
                matrix = normal.sum((0, 1)).view(rank, rank, y, y).transpose(1, 2).reshape(rank * y, -1)
                solved.append(_solve(matrix, right[c].sum(0).reshape(-1, 1)).view(1, rank, y))
            else:
                matrix = self._spatial_matrix(normal, rank)
                solved.append(_solve(matrix, right[c].reshape(-1, 1)).view(i, rank, y))
        return torch.stack(solved)

    def improve_mix(self, w: Tensor, d: Tensor) -> Tensor:
        """A better W for this D, starting from the given one.

        There is one problem for each o; its blocks over R are the preconditioner.
        """
        i, s, y = self.sizes
        own = self.second.view(i, s, y, i, s, y).diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2)  # [Y, Y, I, S]
        blocks = torch.einsum("oiry,yzis,oiqz->oisrq", d, own, d)

        def gradient(w: Tensor, target: Tensor | None = None) -> Tensor:
            return d @ self._pull(self.product(w, d), target).mT

        start = gradient(w, self.cross)
        solve = block_solver(blocks)
        return conjugate_gradients(
            gradient, lambda g: solve(g.transpose(2, 3)).transpose(2, 3), w, start, (1, 2, 3), self.gradients
        )

    def improve_spatial(self, w: Tensor, d: Tensor) -> Tensor:
        """A better D for this W, starting from the given one.

        There is one problem for each o, or one for all if D is shared over o; the blocks over Y are the preconditioner.
        """
        i, s, y = self.sizes
        own = self.second.view(i, s, y, i, s, y).diagonal(dim1=0, dim2=3)  # [S, Y, S, Y, I]
        shared = self.form.block_axes

        def reduced(parts: Tensor) -> Tensor:
            """The sum over the axis that D is shared over, if there is one."""
            if shared == "o":
                return parts.sum(1, keepdim=True)
            if shared == "i":
                return (parts * self.scale.square().view(-1, *[1] * (parts.dim() - 1))).sum(0, keepdim=True)
            return parts

        def gradient(d: Tensor, target: Tensor | None = None) -> Tensor:
            return reduced(w @ self._pull(self.product(w, d), target))

        blocks = reduced(torch.einsum("oirs,sytzi,oirt->oiryz", w, own, w))
        axes = (0, 1, 2, 3) if shared == "i" else (1, 2, 3)
        return conjugate_gradients(gradient, block_solver(blocks), d, gradient(d, self.cross), axes, self.gradients)

    def _pull(self, filter_: Tensor, target: Tensor | None) -> Tensor:
        """The filter times M, minus the target if there is one: half the gradient of J at this filter."""
        product = (filter_.flatten(1) @ self.second).view_as(filter_)
        return product if target is None else product - target

    def _spatial_matrix(self, normal: Tensor, rank: int) -> Tensor:
        """The matrix ``[I R Y, I R Y]`` of the normal equations."""
        i, _, y = self.sizes
        return normal.view(i, i, rank, rank, y, y).permute(0, 2, 4, 1, 3, 5).reshape(i * rank * y, -1)


def whitened_svd(problem: FactorProblem, rank: int) -> Tensor:
    """The filter ``[O, I, S, k, k]`` of this rank that is the best one if M is a Kronecker product in every block.

    The two parts of the product belong to the rows of the block and to the pixels.
    """
    form, (o, i, s, k) = problem.form, problem.shape
    y = k * k
    moment = problem.second.view(i, s, y, i, s, y)
    if form.block_axes == "o":  # one block for each o; its rows are all (i, s)
        rows = torch.einsum("isyjty->isjt", moment).reshape(1, i * s, i * s)
        pixels = torch.einsum("isyisz->yz", moment)[None]
        blocks = problem.weight.reshape(o, i * s, y)
    else:
        rows = torch.einsum("isyity->ist", moment)
        pixels = torch.einsum("isyisz->iyz", moment)
        if form.block_axes == "i":  # one block for each i; its rows are (o, s), and every o has the same moment of s
            blocks = (problem.weight * problem.scale.view(-1, 1, 1, 1)).transpose(0, 1).reshape(i, o * s, y)
            rows = torch.stack([torch.block_diag(*[part] * o) for part in rows])
        else:
            blocks = problem.weight.reshape(o * i, s, y)
            rows, pixels = rows.repeat(o, 1, 1), pixels.repeat(o, 1, 1)
    (a, a_inverse), (b, b_inverse) = _roots(rows), _roots(pixels)
    u, sigma, vh = torch.linalg.svd(a @ blocks @ b, full_matrices=False)
    best = a_inverse @ (u[..., :rank] * sigma[..., None, :rank]) @ vh[..., :rank, :] @ b_inverse
    if form.block_axes == "i":
        filter_ = best.view(i, o, s, y).transpose(0, 1) / problem.scale.view(-1, 1, 1, 1)
    else:
        filter_ = best.view(o, i, s, y)
    return problem.unframe(filter_.contiguous())


def _floored(values: Tensor, least: Tensor) -> Tensor:
    """The values, raised to the least where they are below it; all ones if every value is zero."""
    return values.clamp_min(least) if least > torch.finfo(values.dtype).tiny else torch.ones_like(values)


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square roots of positive matrices, and their inverses; small eigenvalues are raised to a floor."""
    values, vectors = torch.linalg.eigh(matrices)
    values = values.clamp_min(FLOOR * values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny))
    root = values.sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The least-norm solution of a positive semidefinite system, by Cholesky if the matrix is definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if not failed and diagonal.amin() > FLOOR**0.5 * diagonal.amax():
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > FLOOR * values[-1]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
    return vectors @ (inverse[:, None] * (vectors.mT @ right))
