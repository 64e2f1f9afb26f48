"""What a conversion is asked for. Everything is checked before anything slow begins."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from analysis.allocation.allocators import ALLOCATORS
from analysis.allocation.budget import Budget
from analysis.allocation.options import forms_named
from analysis.allocation.sensitivity import Options, from_table
from gconv.functional.form_base import Form
from gconv.functional.forms import FORMS, check_execution
from gconv.models.cost import Cost, cost
from gconv.system.errors import InputError, one_of

from .layers import Layer, Runs, group_layers, runs_of, sharing
from .splits import Splits

MINIMISE = ("auto", "weights", "outputs")


@dataclass(frozen=True)
class Request:
    """One conversion: the network, the budget and the images, which fit together.

    Attributes:
        before: a copy of the network, in eval mode.
        size: the shape of one image, ``(C, H, W)``.
        costs: of the network as given.
        form: as it was named.
        forms: the forms that layers may take: the named one, or all for ``auto``.
        budget: the budget.
        allocation: how the budget is shared out.
        outputs: whether layers are fitted to their outputs; else to their filters.
        execution: of every layer, or ``auto``.
        splits: the images.
        seed: of everything that is drawn.
        options: of every layer, as an earlier conversion measured them; None if they are to be measured.
        compared_by: the error that an earlier conversion measured (:class:`analysis.allocation.sensitivity.Measured`).
        runs: for each group-to-group layer how it runs, in the order in which they run.
        shared: for each layer that shares a parameter, and therefore stays as it is, the reason.
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
    splits: Splits
    seed: int
    options: Options | None
    compared_by: str | None
    runs: dict[str, Runs]
    shared: dict[str, str]

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        form: str,
        budget: Budget,
        splits: Splits,
        *,
        allocation: str = "auto",
        minimise: str = "auto",
        execution: str = "auto",
        sensitivity: Any = None,
        seed: int = 0,
        input_shape: Sequence[int] | None = None,
    ) -> Request:
        """The request for these arguments of :func:`analysis.convert`.

        Raises:
            InputError: as there.
        """
        forms = forms_named(form)
        _check_names(forms, allocation, minimise, execution)
        train = splits.train
        if minimise == "outputs" and train is None:
            raise InputError("minimise='outputs' needs training images. Give them as data.")
        if budget.kind == "max_drop" and (splits.validation is None or train is None):
            raise InputError("max_drop needs training and validation images. Give them as data and validation.")
        layers = _checked_layers(model)
        _check_rank(budget, form, forms, layers.values())
        size = input_shape or getattr(model, "input_shape", None) or (train and train.images.shape[1:])
        if not size:
            raise InputError("the size of an image is unknown. Give input_shape, such as (1, 28, 28), or data.")
        before = copy.deepcopy(model).eval()
        costs = cost(before, size)
        splits.check(before)
        outputs = train is not None and minimise != "weights"
        options = compared_by = None
        if sensitivity is not None:
            options = from_table(before, sensitivity)
            compared_by = sensitivity.get("compared_by", "not recorded")
            _check_measured(sensitivity, forms, outputs)
        runs = runs_of(before, group_layers(before), size)
        return cls(
            before, size, costs, form.lower(), forms, budget, allocation, outputs, execution,
            splits, seed, options, compared_by, runs, sharing(before),
        )  # fmt: skip

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers from group to group, in the order in which they run."""
        layers = group_layers(self.before)
        return {name: layers[name] for name in self.runs}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "form": self.form,
            **self.budget.to_dict(),
            "allocation": self.allocation,
            "minimise": "outputs" if self.outputs else "weights",
            "execution": self.execution,
        }


def _check_names(forms: tuple[Form, ...], allocation: str, minimise: str, execution: str) -> None:
    for label, value, known in (
        ("allocation", allocation, ("auto", *ALLOCATORS)),
        ("minimise", minimise, MINIMISE),
    ):
        if value not in known:
            raise one_of(label, value, known)
    for one in forms:
        check_execution(execution, one)


def _checked_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers from group to group.

    Raises:
        InputError: there are none, the model is itself one, or the network has weights that are not finite.
    """
    layers = group_layers(model)
    if not layers:
        raise InputError("the network has no group-to-group layer to separate. Give one with gconv.GConv2d layers.")
    if "" in layers:
        raise InputError("the model is a single layer. Use gconv.SeparableGConv2d.from_dense to separate it.")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"the network has NaN or infinite entries in {name}. Give one with finite weights.")
    return layers


def _check_rank(budget: Budget, form: str, forms: tuple[Form, ...], layers: Iterable[Layer]) -> None:
    if budget.kind == "rank":
        largest = max(f.max_rank(layer.filter_shape) for f in forms for layer in layers)
        if budget.value > largest:
            raise InputError(
                f"rank {budget.value} is above the largest that form {form} has here; accepted: 1 to {largest}"
            )


def _check_measured(table: dict[str, Any], forms: tuple[Form, ...], outputs: bool) -> None:
    """Raises InputError if a table of options lacks a form, or has errors of filters where those of outputs are due."""
    measured = table.get("forms", list(FORMS))
    missing = [form.name for form in forms if form.name not in measured]
    if missing:
        raise InputError(
            f"sensitivity was measured for form {', '.join(measured)}, not for {', '.join(missing)}. "
            "Give that of a report with form auto."
        )
    if outputs and table.get("minimise") == "weights":
        raise InputError("sensitivity is of the filters alone. Give that of a report with minimise outputs.")
