"""What each option of each layer does to the network's output when that layer alone is replaced.

There are two measures. The relative error of the layer's own output comes from its moments, for every option, in one
pass over the images. The divergence of the class scores, ``KL(p_original || p_replaced)`` averaged over images, needs a
pass for every option. It tells how much the rest of the network minds, so errors of different layers can be added up.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from analysis.fitting.alternating import fit_factors
from analysis.fitting.moments import Moments, channel_weights, collect_moments, passes
from gconv.functional.forms import FORMS
from gconv.models.cost import cost
from gconv.nn.conv import GConv2d
from gconv.nn.modes import evaluating
from gconv.nn.replace import replace_module
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.training.datasets import Split

from .allocators import Option
from .pareto import undominated

OF_SCORES = "divergence of the class scores"
OF_OUTPUTS = "squared relative error of the layer's own output"
OF_FILTERS = "share of the filter's energy that is lost"

FIT_WORK = 2e12
"""Limit of :func:`measurable`: options times (entries of a patch)³, which takes some minutes."""
SCORE_WORK = 10**13
"""Multiply-accumulates, in the published convention, of classifying the probe images with every option: some minutes.

The limit is one of work and not of time, so that the same network gets the same errors on every machine.
"""
IMAGES = 1000  # images that the moments are taken from
_PATCHES = 50_000
PROBES = 500  # images that are classified with every option
_STEPS = 12  # rounds of alternating least squares: enough to rank the options

Options = dict[str, tuple[Option, ...]]
Layer = GConv2d | SeparableGConv2d


class Measured(NamedTuple):
    """The options of every layer, and what their ``error`` is.

    Attributes:
        options: for each layer; those that another one beats in parameters, MACs and relative error are left out.
        compared_by: ``OF_SCORES``, in nats an image, or ``OF_OUTPUTS``.
    """

    options: Options
    compared_by: str


def measurable(model: nn.Module, options: Options) -> bool:
    """Whether fitting every option of every layer is a matter of minutes."""
    work = 0
    for name, own in options.items():
        _, i, s, k = _layer(model, name).filter_shape
        work += len(own) * (i * s * k * k) ** 3
    return work <= FIT_WORK


def measure_options(model: nn.Module, options: Options, data: Split, probes: Split | None, seed: int) -> Measured:
    """Measure ``relative_error``, ``error`` and ``drop`` of every option.

    Args:
        model: the trained network.
        options: of its layers, in the order in which they run; the first option leaves the layer as it is.
        data: training images, for the moments.
        probes: validation images and labels, for the divergence and the drop. Without them training images are used,
            and the drop is not measured.
        seed: of the choice of images and patches.
    """
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    images = data.images[chosen[:IMAGES]]
    measured: Options = {}
    fits: dict[str, list[nn.Module]] = {}
    several = [name for name, own in options.items() if len(own) > 1]
    weights = channel_weights(model, several, images[:PROBES], seed=seed) if several else {}
    for names in passes(model, several):
        moments = collect_moments(model, model, names, images, seed=seed, patches=_PATCHES)
        for name in tqdm(names, desc="fitting options", disable=None, leave=False, unit="layer"):
            measured[name], fits[name] = _fitted(_layer(model, name), options[name], moments[name], weights[name])
    probe = Split(images[:PROBES], data.labels[chosen[:PROBES]]) if probes is None else probes
    some = torch.randperm(len(probe.labels), generator=torch.Generator().manual_seed(seed))[:PROBES]
    probe = Split(probe.images[some], probe.labels[some])
    runs = sum(map(len, fits.values())) * len(some)
    affordable = runs * cost(model, probe.images.shape[1:]).macs_published <= SCORE_WORK
    if affordable:
        for name, pairs in _divergences(model, fits, probe).items():
            first, *others = measured[name]
            compared = (
                replace(option, error=divergence, drop=None if probes is None else drop)
                for option, (divergence, drop) in zip(others, pairs, strict=True)
            )
            measured[name] = (first, *compared)
    by_layer = {name: measured.get(name, own) for name, own in options.items()}
    return Measured(by_layer, OF_SCORES if affordable else OF_OUTPUTS)


def _fitted(
    layer: Layer, options: Sequence[Option], moments: Moments, weights: Tensor
) -> tuple[tuple[Option, ...], list[nn.Module]]:
    """The options of a layer with the errors of its own output, and a fitted layer for each but the first.

    Options that another one beats on every count are left out, except the first, which is the layer as it is.
    """
    rows, made = [options[0]], []
    for option in options[1:]:
        assert option.form is not None and option.rank is not None
        fitted = fit_factors(layer, FORMS[option.form], option.rank, moments, weights=weights, steps=_STEPS)
        rows.append(replace(option, error=fitted.error**2, relative_error=fitted.error))
        factors = fitted.mix, fitted.spatial, fitted.bias
        made.append(SeparableGConv2d.from_factors(layer, option.form, *factors, option.execution))
    best = undominated([(row.parameters, row.macs, row.relative_error) for row in rows])
    kept = [n for n, good in enumerate(best) if good or not n]
    return tuple(rows[n] for n in kept), [made[n - 1] for n in kept if n]


def _layer(model: nn.Module, name: str) -> Layer:
    layer = model.get_submodule(name)
    assert isinstance(layer, (GConv2d, SeparableGConv2d))
    return layer


def _divergences(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], probe: Split
) -> dict[str, list[tuple[float, float]]]:
    """For every replacement of a layer (divergence in nats, points of accuracy lost).

    Batch norm uses the statistics of these images, as if they had been re-estimated.
    """
    network = copy.deepcopy(model)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None
    like = next(network.parameters())
    images, labels = probe.images.to(like), probe.labels.to(like.device)
    result: dict[str, list[tuple[float, float]]] = {}
    with evaluating(network), torch.inference_mode():
        expected = F.log_softmax(network(images).double(), 1)
        right = (expected.argmax(1) == labels).double().mean()
        count = sum(map(len, layers.values()))
        with tqdm(total=count, desc="measuring options", disable=None, leave=False, unit="option") as bar:
            for name, replacements in layers.items():
                trained = current = network.get_submodule(name)
                result[name] = []
                for layer in (*replacements, trained):
                    replace_module(network, current, layer.eval())
                    current = layer
                    if layer is trained:  # put back in its place
                        break
                    got = F.log_softmax(network(images).double(), 1)
                    divergence = F.kl_div(got, expected, log_target=True, reduction="batchmean")
                    drop = right - (got.argmax(1) == labels).double().mean()
                    result[name].append((max(0.0, float(divergence)), 100 * float(drop)))
                    bar.update()
    return result


def fingerprint(model: nn.Module) -> str:
    """A digest of the network's weights; it tells which network a sensitivity table belongs to."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        # As bytes: NumPy does not know every type of PyTorch.
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_table(model: nn.Module, options: Options) -> dict[str, Any]:
    """The options as plain data, which can be stored and used again."""
    return {
        "network": fingerprint(model),
        "layers": {name: [asdict(option) for option in own] for name, own in options.items()},
    }


def from_table(model: nn.Module, table: Any) -> Options:
    """The options in a table of :func:`to_table`.

    Raises:
        InputError: it is not such a table, or it is that of another network.
    """
    try:
        given = table["network"]
        options = {name: tuple(Option(**row) for row in rows) for name, rows in table["layers"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError("sensitivity is not a table of this package. Give that of an earlier report.") from error
    if given != fingerprint(model):
        raise InputError("sensitivity was measured on another network. Give that of a report on this one.")
    return options
