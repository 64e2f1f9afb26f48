"""The separable filter of a given form and rank whose *output* is closest to a layer's, under given moments.

With the moments of :mod:`analysis.fitting.moments` the squared output error of a generator K is, for output channel o,

    J_o(K) = K_o M K_oᵀ - 2 b_o K_oᵀ + c_o,          M = E p pᵀ,  b = E y pᵀ,  c = E y².

A separable filter is a product of two factors, ``K[o, i, s, y] = sum_r W[o, i, r, s] D[o, i, r, y]``, in the frame of
its form; the form says over which channels D is shared. J is quadratic in one factor while the other is fixed.
Alternating least squares solves for the two factors in turn, and never increases J.

There are two starting points: the truncated SVD of the filter, and a whitened SVD, which is the exact solution if M is
a Kronecker product of a part over rows and a part over pixels. After a few rounds the better one goes on. A large layer
takes a few steps of conjugate gradients in place of each exact solution: these need products with M alone, not the
normal equations, and never increase J either.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gconv.functional.form_base import FilterShape, Form
from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d

from .factor_problem import FLOOR, FactorProblem, whitened_svd
from .moments import Moments

PRIOR = 1e-3
"""Weight of staying near the trained filter, relative to the mean eigenvalue of M. It bounds all eigenvalues below."""
ROUNDS_WORK = 2 * 10**10
"""Multiply-accumulates of the default number of rounds. The first rounds gain the most, so large layers end early."""
GRADIENTS = 10
"""Steps of conjugate gradients that replace one solution of the normal equations, where that would be more work."""
_FIRST_STEPS = 5  # rounds of both starting points, before the worse one is dropped
_ROUNDS = (3, 100)  # at least and at most


@dataclass(frozen=True)
class Fit:
    """The result of :func:`fit_factors`. All tensors are float64.

    Attributes:
        mix: as :class:`gconv.SeparableGConv2d` stores it; the scale is shared evenly between the two factors.
        spatial: likewise.
        bias: ``[O]``, or None if the layer has none.
        error: relative output error, ``sqrt(sum_o J_o / c_o / O)``.
        objective: the value that is minimised, at the start and after every round. It never increases.
    """

    mix: Tensor
    spatial: Tensor
    bias: Tensor | None
    error: float
    objective: tuple[float, ...]


def fit_factors(
    layer: GConv2d | SeparableGConv2d,
    form: Form,
    rank: int,
    moments: Moments,
    *,
    weights: Tensor | None = None,
    steps: int | None = None,
    tolerance: float = 1e-5,
    prior: float = PRIOR,
    gradients: int | None = None,
) -> Fit:
    """Fit the factors of a separable filter to a layer's output.

    If the layer has a bias, covariances replace the second moments, and the bias is fitted too.

    Args:
        layer: the trained layer, which gave the outputs in the moments.
        form: of the separable filter.
        rank: of the separable filter.
        moments: from :func:`analysis.fitting.moments.collect_moments`.
        weights: ``[O]``, what an error in each channel costs (:func:`analysis.fitting.moments.channel_weights`). It
            matters where channels share kernels (``gc_in``). By default every channel counts relative to its own
            power, as a batch norm behind the layer would see it.
        steps: the largest number of rounds, each of two least-squares problems. The default is 100, or as many as
            keep the work of a large layer within seconds (:data:`ROUNDS_WORK`).
        tolerance: the fit ends when a round lowers the objective by less than this share.
        prior: see :data:`PRIOR`; 0 fits the moments alone.
        gradients: take so many steps of conjugate gradients for each problem. By default small layers solve the
            normal equations, and large ones take :data:`GRADIENTS` steps.

    Raises:
        InputError: the rank is out of range, or the weight is not finite.
    """
    given = moments
    if layer.bias is not None:
        moments = moments.centred()
    weight = layer.weight.detach().double()
    problem = FactorProblem(layer, form, moments, prior=prior, weights=weights, gradients=gradients or GRADIENTS)
    plain = problem.split(weight, rank)  # first, because it checks the rank and the weight
    work, direct = work_of_round(form, rank, layer.filter_shape)
    direct = direct and gradients is None
    if steps is None:
        least, most = _ROUNDS
        steps = max(least, min(most, ROUNDS_WORK // work))
    starts = [plain, problem.split(whitened_svd(problem, rank), rank)]
    runs = [_alternate(problem, *start, min(steps, _FIRST_STEPS), tolerance, direct) for start in starts]
    mix, spatial, history = min(runs, key=lambda run: run[2][-1])
    mix, spatial, more = _alternate(problem, mix, spatial, steps - len(history) + 1, tolerance, direct)
    filter_ = problem.unframe(problem.product(mix, spatial))
    # A truncated SVD at the filter's own rank changes nothing but the balance of the factors.
    factors = form.factor(filter_, rank, layer.tables.pixels)
    flat = filter_.flatten(1)
    bias = None if layer.bias is None else given.target - flat @ given.mean
    return Fit(*factors, bias, relative_output_error(flat, moments), (*history, *more[1:]))


def _alternate(
    problem: FactorProblem, w: Tensor, d: Tensor, steps: int, tolerance: float, direct: bool
) -> tuple[Tensor, Tensor, list[float]]:
    """Alternate at most ``steps`` times: W, D, and the objective at the start and after every round."""
    history = [problem.objective(problem.product(w, d))]
    for _ in range(steps):
        if direct:
            d_new = problem.solve_spatial(w)
            w_new = problem.solve_mix(d_new)
        else:
            d_new = problem.improve_spatial(w, d)
            w_new = problem.improve_mix(w, d_new)
        w_new, d_new = _balanced(w_new, d_new)
        value = problem.objective(problem.product(w_new, d_new))
        if not value < history[-1]:  # at the minimum only rounding is left
            break
        w, d = w_new, d_new
        history.append(value)
        if history[-2] - value <= tolerance * history[-2]:
            break
    return w, d, history


def _balanced(w: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The same filter with D's kernels at norm one, so that neither factor grows without bound."""
    norm = d.norm(dim=-1, keepdim=True)
    norm = norm.where(norm > 0, 1)
    return w * norm, d / norm


def work_of_round(form: Form, rank: int, shape: FilterShape) -> tuple[int, bool]:
    """Multiply-accumulates of one round, and whether it solves the normal equations.

    It does so where all rounds of them stay within :data:`ROUNDS_WORK`, or where they are less work than
    :data:`GRADIENTS` steps of conjugate gradients.
    """
    o, i, s, k = shape
    mix, spatial = i * rank * s, (1 if form.block_axes == "o" else i) * rank * k * k
    problems = 1 if form.block_axes == "i" else o
    direct = problems * (2 * (i * rank * s * k * k) ** 2 + (mix**3 + spatial**3) // 3)
    improved = 2 * GRADIENTS * o * (i * s * k * k) ** 2
    solved = direct <= max(improved, ROUNDS_WORK // _ROUNDS[1])
    return (direct if solved else improved), solved


def relative_output_error(generator: Tensor, moments: Moments) -> float:
    """The relative output error ``sqrt(mean_o J_o / c_o)`` of a generator ``[O, n]``.

    Channels without power do not count.
    """
    objective = ((generator @ moments.second - 2 * moments.cross) * generator).sum(1) + moments.power
    alive = moments.power > FLOOR * moments.power.max()
    if not alive.any():
        return 0.0
    return float((objective[alive].clamp_min(0) / moments.power[alive]).mean().sqrt())
