"""What a conversion is asked for, checked before anything slow."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.allocation.allocators import ALLOCATORS
from analysis.allocation.budget import Budget
from analysis.allocation.options import forms_named
from analysis.allocation.sensitivity import Options, from_table
from gconv.functional.form_base import EXECUTIONS, Form
from gconv.functional.forms import FORMS, check_execution
from gconv.models.cost import Cost, cost
from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError, one_of
from gconv.training.datasets import Split

MINIMISE = ("auto", "weights", "outputs")


@dataclass(frozen=True)
class Request:
    """One conversion: the network, the budget, and the data, all of which fit together.

    Attributes:
        before: a copy of the network, in eval mode.
        size: of one image, ``(C, H, W)``.
        costs: of the network as given.
        form: as it was named; ``forms`` are the forms that this stands for.
        forms: that layers may take.
        budget: the one that was given.
        allocation: how it is to be shared out.
        outputs: whether the layers' outputs are to be kept, not their filters.
        execution: of every layer, or ``auto``.
        train: images to fit on.
        validation: images to compare options on.
        test: images to report the error on.
        seed: of all that is drawn.
        options: of every layer, as measured in an earlier conversion; None if they are to be measured.
    """

    before: nn.Module
    size: Sequence[int]
    costs: Cost
    form: str
    forms: tuple[Form, ...]
    budget: Budget
    allocation: str
    outputs: bool
    execution: str
    train: Split | None
    validation: Split | None
    test: Split | None
    seed: int
    options: Options | None = None

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        form: str,
        budget: Budget,
        allocation: str,
        minimise: str,
        execution: str,
        data: Split | Iterable[tuple[Tensor, Tensor]] | None,
        validation: Split | None,
        test: Split | None,
        sensitivity: Any,
        seed: int,
        input_shape: Sequence[int] | None,
    ) -> Request:
        """The request for these arguments of :func:`analysis.convert`.

        Raises:
            InputError: as there.
        """
        forms = forms_named(form)
        for label, value, known in (
            ("allocation", allocation, ("auto", *ALLOCATORS)),
            ("minimise", minimise, MINIMISE),
            ("execution", execution, ("auto", *EXECUTIONS)),
        ):
            if value not in known:
                raise one_of(label, value, known)
        if execution != "auto":
            for one in forms:
                check_execution(execution, one)
        train = None if data is None else _as_split(data)
        if minimise == "outputs" and train is None:
            raise InputError("minimise outputs needs training images; accepted: data")
        if budget.kind == "max_drop" and (validation is None or train is None):
            raise InputError("max_drop needs training and validation images; accepted: data and validation")
        layers = group_layers(model)
        if not layers:
            raise InputError("the network has no group-to-group layer to separate; accepted: a p2 to p4m network")
        if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            raise InputError("the network has NaN or infinite weights; accepted: finite weights")
        if budget.kind == "rank":
            largest = max(f.max_rank(layer.filter_shape) for f in forms for layer in layers.values())
            if budget.value > largest:
                raise InputError(
                    f"rank {budget.value} is above the largest of form {form} here; accepted: 1 to {largest}"
                )
        size = input_shape or getattr(model, "input_shape", None) or (train and train.images.shape[1:])
        if not size:
            raise InputError("the size of an image is unknown; give input_shape, such as (1, 28, 28), or data")
        before = copy.deepcopy(model).eval()
        costs = cost(before, size)
        for label, split in (("data", train), ("validation", validation), ("test", test)):
            if split is not None:
                _check_split(before, label, split)
        outputs = train is not None and minimise != "weights"
        options = None
        if sensitivity is not None:
            options = from_table(before, sensitivity)
            _check_measured(sensitivity, forms, outputs)
        return cls(
            before, size, costs, form.lower(), forms, budget, allocation, outputs, execution,
            train, validation, test, seed, options,
        )  # fmt: skip

    @property
    def layers(self) -> dict[str, GConv2d | SeparableGConv2d]:
        """The layers from group to group, in the order in which they run."""
        layers = group_layers(self.before)
        return {row.name: layers[row.name] for row in self.costs.layers if row.name in layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "form": self.form,
            **self.budget.to_dict(),
            "allocation": self.allocation,
            "minimise": "outputs" if self.outputs else "weights",
            "execution": self.execution,
        }


def group_layers(model: nn.Module) -> dict[str, GConv2d | SeparableGConv2d]:
    """The layers from group to group by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (GConv2d, SeparableGConv2d))}


def _as_split(data: Split | Iterable[tuple[Tensor, Tensor]]) -> Split:
    if isinstance(data, Split):
        return data
    batches = list(data) if isinstance(data, Iterable) else []
    accepted = "a Split, such as Dataset.train, or a loader of batches"
    if not batches:
        raise InputError(f"data has no images; accepted: {accepted}")
    try:
        images, labels = zip(*batches, strict=True)
        return Split(torch.cat(images), torch.cat(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data has batches that are not images of one size with labels; accepted: {accepted}"
        ) from error


def _check_measured(table: dict[str, Any], forms: tuple[Form, ...], outputs: bool) -> None:
    """Raises InputError if a table of options lacks a form, or has errors of filters where those of outputs are due."""
    measured = table.get("forms", list(FORMS))
    missing = [form.name for form in forms if form.name not in measured]
    if missing:
        what = f"sensitivity was measured for form {', '.join(measured)} and not {', '.join(missing)}"
        raise InputError(f"{what}; accepted: that of a report with form auto")
    if outputs and table.get("minimise") == "weights":
        raise InputError("sensitivity is of the filters alone; accepted: that of a report with minimise outputs")


def _check_split(model: nn.Module, label: str, split: Split) -> None:
    """Raises InputError unless the network takes the images and has a score for every label."""
    if not isinstance(split, Split):
        raise InputError(f"{label} is a {type(split).__name__}; accepted: a Split, such as Dataset.{label}")
    images, labels = split
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(f"{label} has {len(images)} images and {len(labels)} labels; accepted: as many, at least one")
    if not torch.isfinite(images).all():
        raise InputError(f"{label} has NaN or infinite pixels; accepted: finite images")
    like = next(model.parameters())
    try:
        with torch.no_grad():
            classes = model(images[:1].to(like)).shape[1]
    except (InputError, RuntimeError, IndexError) as error:
        wanted = getattr(model, "input_shape", None)
        accepted = "what the network takes" if wanted is None else f"[N, {', '.join(map(str, wanted))}]"
        raise InputError(f"{label} has images {list(images.shape)}; accepted: {accepted}") from error
    if labels.dim() != 1 or labels.is_floating_point():
        what = f"{label} has labels of shape {list(labels.shape)} and type {labels.dtype}"
        raise InputError(f"{what}; accepted: [N] whole numbers, the number of each image's class")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"{label} has labels from {low} to {high}; accepted: 0 to {classes - 1}")
