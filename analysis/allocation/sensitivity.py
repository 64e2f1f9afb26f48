"""What each option of each layer does to the network's output when that layer alone is replaced.

Two measures. The relative error of the layer's own output comes from its moments, for every option, in one pass over
the images. The divergence of the class scores, ``KL(p_original || p_replaced)`` averaged over images, needs a pass per
option; it tells how much the rest of the network minds, so that errors of different layers can be added up.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from analysis.fitting.alternating import fit
from analysis.fitting.moments import channel_weights, collect_moments, passes
from gconv.functional.forms import FORMS
from gconv.nn.conv import GConv2d
from gconv.nn.modes import evaluating
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.training.datasets import Split

from .allocators import Option

_IMAGES = 1000  # images that the moments are taken from
_PATCHES = 50_000
_PROBES = 500  # images that are classified for every option
_STEPS = 12  # of alternating least squares: enough to rank the options
_SECONDS = 180.0  # more than that of classifying is not done; the layers' own errors have to do

_WORK = 2e12  # options times (entries of a patch)³: some minutes; a p4m-ResNet44 has ten times as much

Options = dict[str, tuple[Option, ...]]


def measurable(model: nn.Module, options: Options) -> bool:
    """Whether fitting every option of every layer is a matter of minutes."""
    work = 0
    for name, own in options.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, (GConv2d, SeparableGConv2d))
        _, i, s, k = layer.filter_shape
        work += len(own) * (i * s * k * k) ** 3
    return work <= _WORK


def measure_options(model: nn.Module, options: Options, data: Split, probes: Split | None, seed: int) -> Options:
    """The options with ``relative_error``, ``error`` and ``drop`` measured; those that lose on every count left out.

    Args:
        model: the trained network.
        options: of its layers, in the order in which they run; the first leaves the layer as it is.
        data: training images, for the moments.
        probes: validation images and labels, for the divergence and the drop; without them training images are used,
            and the drop is not measured.
        seed: of the choice of images and patches.

    Returns:
        The options; ``error`` is the divergence in nats an image or, for networks in which that takes too long, the
        squared relative error.
    """
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    images = data.images[chosen[:_IMAGES]]
    measured: Options = {}
    fits: dict[str, list[nn.Module]] = {}
    several = [name for name, own in options.items() if len(own) > 1]
    weights = channel_weights(model, several, images[:_PROBES], seed=seed) if several else {}
    for names in passes(model, several):
        moments = collect_moments(model, model, names, images, seed=seed, patches=_PATCHES)
        for name in tqdm(names, desc="fitting options", disable=None, leave=False, unit="layer"):
            layer = model.get_submodule(name)
            assert isinstance(layer, (GConv2d, SeparableGConv2d))
            rows, made = [options[name][0]], []
            for option in options[name][1:]:
                assert option.form is not None and option.rank is not None
                fitted = fit(layer, FORMS[option.form], option.rank, moments[name], weights=weights[name], steps=_STEPS)
                rows.append(replace(option, error=fitted.error**2, relative_error=fitted.error))
                made.append(
                    SeparableGConv2d.from_factors(
                        layer, option.form, fitted.mix, fitted.spatial, fitted.bias, option.execution
                    )
                )
            # The first is the layer as it is, and stays even where nothing is lost by another.
            kept = [n for n, row in enumerate(rows) if not n or not any(_beats(other, row) for other in rows)]
            measured[name] = tuple(rows[n] for n in kept)
            fits[name] = [made[n - 1] for n in kept if n]
    probe = Split(images[:_PROBES], data.labels[chosen[:_PROBES]]) if probes is None else probes
    some = torch.randperm(len(probe.labels), generator=torch.Generator().manual_seed(seed))[:_PROBES]
    divergences = _divergences(model, fits, Split(probe.images[some], probe.labels[some]))
    if divergences is not None:
        for name, pairs in divergences.items():
            first, *others = measured[name]
            measured[name] = (
                first,
                *(
                    replace(option, error=divergence, drop=None if probes is None else drop)
                    for option, (divergence, drop) in zip(others, pairs, strict=True)
                ),
            )
    return {name: measured.get(name, own) for name, own in options.items()}


def _beats(one: Option, other: Option) -> bool:
    """Whether one is nowhere worse and somewhere better."""
    first, second = ((o.parameters, o.macs, o.relative_error) for o in (one, other))
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _divergences(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], probe: Split
) -> dict[str, list[tuple[float, float]]] | None:
    """For every replacement of a layer (divergence in nats, points of accuracy lost); None if it would take too long.

    Batch norm uses the statistics of these images, as if they had been re-estimated.
    """
    network = copy.deepcopy(model)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None
    like = next(network.parameters())
    images, labels = probe.images.to(like), probe.labels.to(like.device)
    count = sum(map(len, layers.values()))
    result: dict[str, list[tuple[float, float]]] = {}
    with evaluating(network), torch.inference_mode():
        expected = F.log_softmax(network(images).double(), 1)
        began = time.perf_counter()
        network(images)
        if count * (time.perf_counter() - began) > _SECONDS:
            return None
        right = (expected.argmax(1) == labels).double().mean()
        with tqdm(total=count, desc="measuring options", disable=None, leave=False, unit="option") as bar:
            for name, replacements in layers.items():
                trained = network.get_submodule(name)
                result[name] = []
                for layer in replacements:
                    network.set_submodule(name, layer.eval())
                    got = F.log_softmax(network(images).double(), 1)
                    divergence = F.kl_div(got, expected, log_target=True, reduction="batchmean")
                    drop = right - (got.argmax(1) == labels).double().mean()
                    result[name].append((max(0.0, float(divergence)), 100 * float(drop)))
                    bar.update()
                network.set_submodule(name, trained)
    return result


def fingerprint(model: nn.Module) -> str:
    """A digest of the network's weights, which a sensitivity table belongs to."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        # As bytes: NumPy does not know every type of PyTorch.
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_table(model: nn.Module, options: Options) -> dict[str, Any]:
    """The options as plain data, to be kept and used again."""
    return {
        "network": fingerprint(model),
        "layers": {name: [asdict(option) for option in own] for name, own in options.items()},
    }


def from_table(model: nn.Module, table: Any) -> Options:
    """The options in a table.

    Raises:
        InputError: it is no such table, or that of another network.
    """
    try:
        given = table["network"]
        options = {name: tuple(Option(**row) for row in rows) for name, rows in table["layers"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError("sensitivity is not a table of this package; accepted: that of an earlier report") from error
    if given != fingerprint(model):
        raise InputError("sensitivity was measured on another network; accepted: that of a report on this one")
    return options
