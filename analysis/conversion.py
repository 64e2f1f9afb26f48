"""Convert a trained network into a separable one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch
from torch import Tensor, nn

from gconv.conv import GConv2d, SeparableGConv2d
from gconv.cost import cost
from gconv.data import Split
from gconv.errors import InputError
from gconv.training import Recipe, evaluate, fit

from .allocation import Budget, choose, energy_curves, forms_named
from .batchnorm import reestimate_batchnorm
from .report import ConversionReport, LayerReport

DEFAULT_ENERGY = 0.95
Network = TypeVar("Network", bound=nn.Module)


def convert(
    model: Network,
    form: str = "auto",
    *,
    rank: int | None = None,
    energy: float | None = None,
    data: Split | Iterable[tuple[Tensor, Tensor]] | None = None,
    test: Split | None = None,
    finetune: int = 0,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
) -> tuple[Network, ConversionReport]:
    """Replace a network's group-to-group layers by separable ones, re-estimate batch norm, and fine-tune if asked.

    Every layer is factored by a truncated SVD of its blocks, the best separable filter of that rank in the Frobenius
    norm. The network stays equivariant whatever the rank. Lifting and 1x1 layers are left alone.

    Args:
        model: a trained network with layers of this package; it is not changed.
        form: ``g``, ``gc`` or ``gc_in`` for every layer; or ``auto``, per layer and only where that has fewer
            parameters and no more MACs: within ``energy`` the form with the fewest parameters, at ``rank`` the form
            that saves most parameters per energy lost.
        rank: the rank of every layer (or the layer's largest, if that is smaller).
        energy: the share of its energy that every layer keeps, at the smallest rank that does (default 0.95).
        data: training images with labels, a :class:`gconv.Split` or a loader of batches: batch norm is re-estimated
            on them, and fine-tuning learns from them.
        test: images on which the error is reported at every stage. Nothing is chosen by them.
        finetune: epochs of further training at the rate that the published recipe ends on; needs ``data``.
        seed: of the fine-tuning's data order and of the random images in the report.
        input_shape: of one image; by default the model's own or that of ``data``.

    Returns:
        The new network in eval mode, and the report.

    Raises:
        InputError: two budgets, a value out of range, an unknown form, a network without a layer to convert, weights
            that are not finite, or fine-tuning without data.
    """
    forms = forms_named(form)
    budget = Budget(rank, DEFAULT_ENERGY if rank is None and energy is None else energy)
    train = None if data is None else _as_split(data)
    if not isinstance(finetune, int) or finetune < 0:
        raise InputError(f"finetune is {finetune!r}; accepted: a whole number of epochs")
    if finetune and train is None:
        raise InputError("fine-tuning needs training images; accepted: data")
    layers = _group_layers(model)
    if not layers:
        raise InputError("the network has no group-to-group layer to separate; accepted: a p2 to p4m network")
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise InputError("the network has NaN or infinite weights; accepted: finite weights")
    if budget.rank is not None:
        largest = max(f.max_rank(layer.filter_shape) for f in forms for layer in layers.values())
        if budget.rank > largest:
            raise InputError(f"rank {budget.rank} is above the largest of form {form} here; accepted: 1 to {largest}")

    size = input_shape or getattr(model, "input_shape", None) or (train and train.images.shape[1:])
    if not size:
        raise InputError("the size of an image is unknown; give input_shape, such as (1, 28, 28), or data")

    before, after = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    costs = {row.name: row for row in cost(before, size).layers}
    report = ConversionReport({"form": form.lower(), **asdict(budget)}, [])
    for name, layer in _group_layers(after).items():
        curves = energy_curves(layer)
        choice = choose(layer, curves, forms, budget, costs[name].positions)
        row = LayerReport(
            name, layer.group.name, tuple(layer.weight.shape), curves, None, None, choice.why, weight_error=0.0
        )
        if choice.option is not None:
            separable = SeparableGConv2d.from_dense(layer, choice.option.form, choice.option.rank)
            row.form, row.rank = choice.option.form.name, choice.option.rank
            row.weight_error = _relative_error(separable.weight, layer.weight)
            after.set_submodule(name, separable)
        report.layers.append(row)

    if all(row.form is None for row in report.layers):
        report.notes.append("nothing was converted, the layers are as given; a lower budget or one form for all may")
    report.measure(before, after, size, next(iter(layers.values())).group, seed)
    _recover(report, before, after, train, test, finetune, seed)
    return after.eval(), report


def to_dense(model: Network) -> Network:
    """A copy of the network with every separable layer folded back to a full one; same output to rounding."""
    dense = copy.deepcopy(model)
    for name, layer in _group_layers(dense).items():
        if isinstance(layer, SeparableGConv2d):
            dense.set_submodule(name, layer.to_dense())
    return dense


def _recover(
    report: ConversionReport,
    before: nn.Module,
    after: nn.Module,
    train: Split | None,
    test: Split | None,
    finetune: int,
    seed: int,
) -> None:
    """Batch norm, then fine-tuning, as far as there is data; the test error of every stage goes into the report."""
    stages = report.accuracy

    def score(stage: str, network: nn.Module) -> None:
        if test is not None:
            stages[stage] = evaluate(network, test, label=f"testing ({stage})").error

    if test is None:
        report.notes.append("accuracy was not measured: no test images were given (--data)")
    else:
        stages["test_images"] = len(test.labels)
    score("before", before)
    score("converted", after)
    if train is None:
        report.notes.append("batch norm was not re-estimated: no training images were given (--data)")
        return
    reestimate_batchnorm(after, train.images)
    score("batch_norm", after)
    if finetune:
        # The rate that the published recipe ends on: the network is trained already.
        recipe = Recipe(finetune, learning_rate=Recipe.learning_rate / 10, decay_epoch=finetune)
        fit(after, train, recipe, seed=seed, label="fine-tuning")
        stages["finetune_recipe"] = recipe.to_dict()
        score("finetuned", after.eval())


def _group_layers(model: nn.Module) -> dict[str, GConv2d | SeparableGConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (GConv2d, SeparableGConv2d))}


def _as_split(data: Split | Iterable[tuple[Tensor, Tensor]]) -> Split:
    if isinstance(data, Split):
        return data
    batches = list(data) if isinstance(data, Iterable) else []
    if not batches:
        raise InputError("data has no images; accepted: a Split, such as Dataset.train, or a loader of batches")
    images, labels = zip(*batches, strict=True)
    return Split(torch.cat(images), torch.cat(labels))


def _relative_error(value: Tensor, reference: Tensor) -> float:
    norm = reference.double().norm().item()
    return (value.double() - reference.double()).norm().item() / norm if norm else 0.0
