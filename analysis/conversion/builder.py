"""Building the network that a plan describes: every layer fitted behind the converted ones before it, then refined."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from analysis.allocation.options import Choice
from analysis.fitting.alternating import fit_factors
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.fitting.moments import channel_weights, collect_moments, passes
from analysis.fitting.reconstruction import refine, refinement_steps
from gconv.functional.form_base import ExecutionChoice
from gconv.functional.forms import FORMS
from gconv.models.cost import cost
from gconv.nn.separable_conv import SeparableGConv2d

from .layers import choose_execution, replace_layer
from .request import Request

# Large networks see fewer images, in fewer groups of layers: each number has a limit in multiply-accumulates beside it.
_IMAGES = 4000  # training images that layers are fitted on; the final statistics of batch norm come from all images
_IMAGES_WORK = 8 * 10**11  # of one forward pass of these images
_PATCHES = 100_000
_WEIGHT_IMAGES = 512  # images that tell what an error in each channel costs
_WEIGHT_WORK = 4 * 10**11  # of one forward pass of these images
_BATCHNORM_IMAGES = 2000  # for batch norm between the groups; at the end all images are used
_PASSES = 8  # groups of layers that are fitted one after the other
_PASSES_WORK = 5 * 10**12  # of all forward passes for these groups together

Plan = dict[str, Choice]


@dataclass
class Built:
    """A converted network.

    Attributes:
        network: the network.
        errors: relative output error of each layer that was fitted.
        refinement_steps: how many steps each fitted layer was refined for.
    """

    network: nn.Module
    errors: dict[str, float] = field(default_factory=dict)
    refinement_steps: int = 0


def build(request: Request, plan: Plan) -> Built:
    """The converted network. Batch norm is re-estimated only as far as the fit needs it."""
    built = Built(copy.deepcopy(request.before))
    names = [name for name, choice in plan.items() if choice.option is not None]
    if request.outputs and names:
        _fit_outputs(request, plan, names, built)
        return built
    for name in names:
        form, rank = _size(plan[name])
        new = SeparableGConv2d.from_dense(request.layers[name], form, rank)
        _set_execution(new, request, plan[name])
        replace_layer(built.network, name, new)
    return built


def _fit_outputs(request: Request, plan: Plan, names: list[str], built: Built) -> None:
    """Fit these layers to their outputs, a group at a time, then refine them one after the other."""
    assert request.splits.train is not None
    train, macs, after = request.splits.train.images, request.costs.macs_executed, built.network
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(request.seed))
    images = train[order[: min(_IMAGES, max(1, _IMAGES_WORK // macs))]]
    some = images[: min(_WEIGHT_IMAGES, max(1, _WEIGHT_WORK // macs))]
    weights = channel_weights(request.before, names, some, seed=request.seed)
    executions: dict[str, ExecutionChoice] = {}
    # Each group takes three passes: for its inputs, for its outputs, and for batch norm thereafter.
    number = max(1, min(_PASSES, _PASSES_WORK // (3 * macs * len(images))))
    for group in passes(request.before, names, -(-len(names) // number)):
        moments = collect_moments(request.before, after, group, images, seed=request.seed, patches=_PATCHES)
        for name in group:
            layer, (form, rank) = request.layers[name], _size(plan[name])
            fitted = fit_factors(layer, FORMS[form], rank, moments.pop(name), weights=weights[name])
            built.errors[name] = fitted.error
            new = SeparableGConv2d.from_factors(layer, form, fitted.mix, fitted.spatial, fitted.bias)
            _set_execution(new, request, plan[name])
            executions[name] = new.execution
            if "irrep" not in new.form.executions:
                new.execution = "dense"  # while it is built: factorised, these forms make maps many times larger
            replace_layer(after, name, new)
        reestimate_batchnorm(after, images[:_BATCHNORM_IMAGES])
    together = macs + cost(after, request.size).macs_executed
    built.refinement_steps = refinement_steps(len(names), together, len(train))
    refine(request.before, after, names, train, built.refinement_steps, seed=request.seed)
    for name, as_planned in executions.items():
        done = after.get_submodule(name)
        assert isinstance(done, SeparableGConv2d)
        done.execution = as_planned


def _size(choice: Choice) -> tuple[str, int]:
    """Form and rank."""
    option = choice.option
    assert option is not None and option.form is not None and option.rank is not None
    return option.form, option.rank


def _set_execution(layer: SeparableGConv2d, request: Request, choice: Choice) -> None:
    """Let a new layer run as the user asked, or else as planned."""
    option = choice.option
    assert option is not None and option.execution is not None
    if request.execution == "auto":
        choose_execution(layer, option.execution)
    else:
        layer.execution = request.execution
