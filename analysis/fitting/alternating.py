"""The separable filter of a given form and rank whose *output* is closest to a layer's, under given moments.

With the moments of :mod:`analysis.fitting.moments` the squared output error of a generator K is, per output channel,

    J_o(K) = K_o M K_oᵀ - 2 b_o K_oᵀ + c_o,          M = E p pᵀ,  b = E y pᵀ,  c = E y².

A separable filter is bilinear in its factors, ``K[o, i, s, y] = sum_r W[o, i, r, s] D[o, i, r, y]`` in the frame of its
form, where the form says over which channels D is shared: J is quadratic in either factor while the other rests.
Alternating least squares solves for one and the other in turn and never increases J. It starts from the plain SVD or
from a whitened SVD (the closed form where M is a Kronecker product of a part over rows and a part over pixels),
whichever is better after a few steps. In a large layer a least-squares problem is not solved to the end but improved by
a few conjugate gradients: these need products with M alone, not the normal equations, and never increase J either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gconv.functional.form_base import FilterShape, Form
from gconv.functional.forms import FORMS
from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d

from .conjugate_gradients import block_solver, conjugate_gradients
from .moments import Moments

PRIOR = 1e-3
"""Weight of staying near the trained filter, relative to the mean eigenvalue of M: a floor under all eigenvalues."""
_FLOOR = 1e-10  # relative to the largest eigenvalue: below this a direction is rounding
_LEAST_WEIGHT = 1e-2  # relative to the mean: no channel is given up, the estimate of its weight may be wrong
_FIRST_STEPS = 5  # before one of the two starts is dropped
ROUNDS_WORK = 2 * 10**10
"""Multiply-accumulates of the default number of rounds. The first rounds gain the most, so large layers end early."""
_ROUNDS = (3, 100)  # at least and at most
_GRADIENTS = 10  # conjugate ones, in place of normal equations that would be more work


@dataclass(frozen=True)
class Fit:
    """The result of :func:`fit`. All float64.

    Attributes:
        mix: as :class:`gconv.SeparableGConv2d` stores it; the scale is shared evenly between the factors.
        spatial: likewise.
        bias: ``[O]``, or None where the layer has none.
        error: relative output error, ``sqrt(sum_o J_o / c_o / O)``.
        objective: what was minimised, after every step; it never increases.
    """

    mix: Tensor
    spatial: Tensor
    bias: Tensor | None
    error: float
    objective: tuple[float, ...]


def fit(
    layer: GConv2d | SeparableGConv2d,
    form: Form,
    rank: int,
    moments: Moments,
    *,
    weights: Tensor | None = None,
    steps: int | None = None,
    tolerance: float = 1e-5,
    prior: float = PRIOR,
) -> Fit:
    """Fit a separable filter to a layer's output.

    How much each output channel counts matters where channels share kernels (``gc_in``). Where the layer has a bias,
    covariances replace the second moments and the bias is fitted with the rest.

    Args:
        layer: the trained layer, which the moments' outputs come from.
        form: of the filter.
        rank: of the filter.
        moments: from :func:`analysis.fitting.moments.collect_moments`.
        weights: ``[O]``, what an error in a channel costs (:func:`analysis.fitting.moments.channel_weights`); by
        default every
            channel counts relative to its own power, as a batch norm after it would see it.
        steps: at most so many rounds of the two least-squares problems; by default 100, or as many as keep the work
            of a large layer within seconds (:data:`ROUNDS_WORK`).
        tolerance: stop when a round lowers the objective by less than this share.
        prior: see :data:`PRIOR`; 0 fits the moments alone.

    Raises:
        InputError: the rank is out of range, or the weight is not finite.
    """
    given = moments
    if layer.bias is not None:
        moments = moments.centred()
    weight = layer.weight.detach().double()
    problem = _Problem(layer, form, moments, prior, weights)
    plain = problem.split(weight, rank)  # first: it checks the rank and the weight
    work, problem.direct = _work(form, rank, layer.filter_shape)
    if steps is None:
        least, most = _ROUNDS
        steps = max(least, min(most, ROUNDS_WORK // work))
    starts = [plain, problem.split(_whitened(problem, rank), rank)]
    runs = [problem.descend(*start, min(steps, _FIRST_STEPS), tolerance) for start in starts]
    mix, spatial, history = min(runs, key=lambda run: run[2][-1])
    mix, spatial, more = problem.descend(mix, spatial, steps - len(history) + 1, tolerance)
    filter_ = problem.unframe(problem.product(mix, spatial))
    # A truncated SVD at the filter's own rank changes nothing but the balance of the factors.
    factors = form.factor(filter_, rank, layer.tables.pixels)
    flat = filter_.flatten(1)
    bias = None if layer.bias is None else given.target - flat @ given.mean
    return Fit(*factors, bias, relative_error(flat, moments), (*history, *more[1:]))


def _work(form: Form, rank: int, shape: FilterShape) -> tuple[int, bool]:
    """Multiply-accumulates of a round, and whether it solves normal equations: where all rounds of it can be done."""
    o, i, s, k = shape
    mix, spatial = i * rank * s, (1 if form.block_axes == "o" else i) * rank * k * k
    problems = 1 if form.block_axes == "i" else o
    direct = problems * (2 * (i * rank * s * k * k) ** 2 + (mix**3 + spatial**3) // 3)
    gradients = 2 * _GRADIENTS * o * (i * s * k * k) ** 2
    solved = direct <= max(gradients, ROUNDS_WORK // _ROUNDS[1])
    return (direct if solved else gradients), solved


def relative_error(generator: Tensor, moments: Moments) -> float:
    """``sqrt(mean_o J_o / c_o)`` of a generator ``[O, n]``; channels without power do not count."""
    objective = _objective(generator, moments)
    alive = moments.power > _FLOOR * moments.power.max()
    if not alive.any():
        return 0.0
    return float((objective[alive].clamp_min(0) / moments.power[alive]).mean().sqrt())


def _objective(generator: Tensor, m: Moments) -> Tensor:
    return ((generator @ m.second - 2 * m.cross) * generator).sum(1) + m.power


class _Problem:
    """J in the frame of a form, its prior included, and the two least-squares steps.

    In the frame a filter is ``[O, I, S, Y]``, Y = k k; W is ``[O, I, R, S]`` and D ``[O or 1, I or 1, R, Y]``.

    Attributes:
        direct: solve the least-squares problems by their normal equations, not by some conjugate gradients.
    """

    direct = True

    def __init__(
        self, layer: GConv2d | SeparableGConv2d, form: Form, moments: Moments, prior: float, weights: Tensor | None
    ) -> None:
        self.form, self.shape, self.pixels = form, layer.filter_shape, layer.tables.pixels
        o, i, s, k = self.shape
        self.sizes = (i, s, k * k)
        weight = layer.weight.detach().double()
        ridge = prior * moments.second.diagonal().mean()
        power = moments.power + ridge * weight.flatten(1).square().sum(1)
        if weights is None:
            # J = sum_o scale_o² J_o: so every channel has the same power.
            self.scale = _floored(power, _FLOOR * power.max()).rsqrt()
        else:
            weights = weights.to(power)
            self.scale = _floored(weights, _LEAST_WEIGHT * weights.mean()).sqrt()
        own = form.input_frame
        index = torch.arange(weight[0].numel(), device=weight.device).reshape(1, i, s, k, k)
        self.order = FORMS["g_turned" if own else "g"].fold(index, self.pixels).flatten()
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
        """W and D of the plain truncated SVD of a filter ``[O, I, S, k, k]``."""
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
        flat, cross = filter_.flatten(1), self.cross.flatten(1)
        errors = ((flat @ self.second - 2 * cross) * flat).sum(1) + self.power
        return float((errors * self.scale.square()).sum())

    def descend(self, w: Tensor, d: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, list[float]]:
        """Alternate at most ``steps`` times; W, D and the objective at the start and after every round."""
        history = [self.objective(self.product(w, d))]
        for _ in range(steps):
            if self.direct:
                d_new = self.solve_spatial(w)
                w_new = self.solve_mix(d_new)
            else:
                d_new = self.improve_spatial(w, d)
                w_new = self.improve_mix(w, d_new)
            w_new, d_new = self.balance(w_new, d_new)
            value = self.objective(self.product(w_new, d_new))
            if not value < history[-1]:  # rounding at the bottom
                break
            w, d = w_new, d_new
            history.append(value)
            if history[-2] - value <= tolerance * history[-2]:
                break
        return w, d, history

    def balance(self, w: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The same filter with D's kernels at norm one, so that neither factor runs away."""
        norm = d.norm(dim=-1, keepdim=True)
        norm = torch.where(norm > 0, norm, 1)
        return w * norm, d / norm

    def solve_mix(self, d: Tensor) -> Tensor:
        """The best W for this D: one problem of size I R S for each o, or one matrix for all if D is shared over o."""
        i, s, y = self.sizes
        o, rank = self.shape.out_channels, d.shape[2]
        right = torch.einsum("oiry,oisy->oirs", d.expand(o, i, rank, y), self.cross).flatten(1)
        size = i * rank * s
        if d.shape[0] == 1:
            matrix = self._normal_mix(d[0])
            return _solve(matrix, right.mT).mT.reshape(o, i, rank, s)
        return torch.stack([_solve(self._normal_mix(d[c]), right[c].view(size, 1)).view(i, rank, s) for c in range(o)])

    def _normal_mix(self, d: Tensor) -> Tensor:
        """``[I R S, I R S]`` for one o; d is ``[I or 1, R, Y]``."""
        i, s, y = self.sizes
        rank = d.shape[1]
        pairs = torch.einsum("iry,jqz->ijrqyz", d, d).reshape(len(d), len(d), rank * rank, y * y)
        normal = (pairs @ self.by_channels.mT).view(i, i, rank, rank, s, s)
        return normal.permute(0, 2, 4, 1, 3, 5).reshape(i * rank * s, -1)

    def solve_spatial(self, w: Tensor) -> Tensor:
        """The best D for this W, shared as in the form."""
        i, s, y = self.sizes
        o, _, rank, _ = w.shape
        right = torch.einsum("oirs,oisy->oiry", w, self.cross)
        if self.form.block_axes == "i":  # shared over o, each o weighted by its scale
            scaled = w * self.scale.view(-1, 1, 1, 1)
            gram = torch.einsum("oirs,ojqt->ijrqst", scaled, scaled).reshape(i, i, rank * rank, s * s)
            normal = self._spatial_matrix(gram @ self.by_channels, rank)
            total = (right * self.scale.square().view(-1, 1, 1, 1)).sum(0)
            return _solve(normal, total.reshape(-1, 1)).view(1, i, rank, y)
        solved = []
        for c in range(o):
            pairs = torch.einsum("irs,jqt->ijrqst", w[c], w[c]).reshape(i, i, rank * rank, s * s)
            normal = pairs @ self.by_channels
            if self.form.block_axes == "o":  # shared over i
                matrix = normal.sum((0, 1)).view(rank, rank, y, y).transpose(1, 2).reshape(rank * y, -1)
                solved.append(_solve(matrix, right[c].sum(0).reshape(-1, 1)).view(1, rank, y))
            else:
                matrix = self._spatial_matrix(normal, rank)
                solved.append(_solve(matrix, right[c].reshape(-1, 1)).view(i, rank, y))
        return torch.stack(solved)

    def improve_mix(self, w: Tensor, d: Tensor) -> Tensor:
        """A better W for this D, from the one given: one problem for each o, preconditioned by its blocks over R."""
        i, s, y = self.sizes
        own = self.second.view(i, s, y, i, s, y).diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2)  # [Y, Y, I, S]
        blocks = torch.einsum("oiry,yzis,oiqz->oisrq", d, own, d)

        def gradient(w: Tensor, target: Tensor | None = None) -> Tensor:
            return d @ self._pull(self.product(w, d), target).mT

        start = gradient(w, self.cross)
        solve = block_solver(blocks)
        return conjugate_gradients(
            gradient, lambda g: solve(g.transpose(2, 3)).transpose(2, 3), w, start, (1, 2, 3), _GRADIENTS
        )

    def improve_spatial(self, w: Tensor, d: Tensor) -> Tensor:
        """A better D for this W, from the one given: one problem for each o, or one for all; blocks over Y."""
        i, s, y = self.sizes
        own = self.second.view(i, s, y, i, s, y).diagonal(dim1=0, dim2=3)  # [S, Y, S, Y, I]
        shared = self.form.block_axes

        def reduced(parts: Tensor) -> Tensor:
            """Sums over what shares D."""
            if shared == "o":
                return parts.sum(1, keepdim=True)
            if shared == "i":
                return (parts * self.scale.square().view(-1, *[1] * (parts.dim() - 1))).sum(0, keepdim=True)
            return parts

        def gradient(d: Tensor, target: Tensor | None = None) -> Tensor:
            return reduced(w @ self._pull(self.product(w, d), target))

        blocks = reduced(torch.einsum("oirs,sytzi,oirt->oiryz", w, own, w))
        axes = (0, 1, 2, 3) if shared == "i" else (1, 2, 3)
        return conjugate_gradients(gradient, block_solver(blocks), d, gradient(d, self.cross), axes, _GRADIENTS)

    def _pull(self, filter_: Tensor, target: Tensor | None) -> Tensor:
        """The filter times M, less the target where there is one: half the gradient of J at the filter."""
        product = (filter_.flatten(1) @ self.second).view_as(filter_)
        return product if target is None else product - target

    def _spatial_matrix(self, normal: Tensor, rank: int) -> Tensor:
        i, _, y = self.sizes
        return normal.view(i, i, rank, rank, y, y).permute(0, 2, 4, 1, 3, 5).reshape(i * rank * y, -1)


def _whitened(problem: _Problem, rank: int) -> Tensor:
    """The filter ``[O, I, S, k, k]`` that is optimal if M is a Kronecker product of rows and pixels in every block."""
    form, (o, i, s, k) = problem.form, problem.shape
    y = k * k
    moment = problem.second.view(i, s, y, i, s, y)
    if form.block_axes == "o":  # one block per o: its rows are all (i, s)
        rows = torch.einsum("isyjty->isjt", moment).reshape(1, i * s, i * s)
        pixels = torch.einsum("isyisz->yz", moment)[None]
        blocks = problem.weight.reshape(o, i * s, y)
    else:
        rows = torch.einsum("isyity->ist", moment)
        pixels = torch.einsum("isyisz->iyz", moment)
        if form.block_axes == "i":  # one block per i, its rows (o, s): the same moment of s for every o
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
    """The values, none of them below the least; where there is nothing but zeros all one."""
    return values.clamp_min(least) if least > torch.finfo(values.dtype).tiny else torch.ones_like(values)


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square roots of positive matrices and their inverses, eigenvalues floored."""
    values, vectors = torch.linalg.eigh(matrices)
    values = values.clamp_min(_FLOOR * values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny))
    root = values.sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The least-norm solution of a positive semidefinite system; Cholesky where it is definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if not failed and diagonal.amin() > _FLOOR**0.5 * diagonal.amax():
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _FLOOR * values[-1]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
    return vectors @ (inverse[:, None] * (vectors.mT @ right))
