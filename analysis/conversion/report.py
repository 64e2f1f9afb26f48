"""The report of a conversion: what was done to each layer, and what it costs and loses, as measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from analysis.latency.isolated import fresh_latency
from analysis.latency.timing import BATCH, latency
from gconv.kernels.config import kernel_config
from gconv.models.cost import cost
from gconv.models.equivariance import equivariance_error
from gconv.models.memory import forward_memory
from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

_OUTPUT_IMAGES = 4
_ROUNDING = 1e-8  # far above what float64 loses in a deep network, far below what a broken symmetry costs


@dataclass
class LayerReport:
    """What happened to one group-to-group layer.

    Attributes:
        name: its name in the network.
        group: its group.
        shape: ``[O, I, S, k, k]`` of the full filter.
        explained_energy: for each form the share of energy kept at rank 1, 2, ….
        form: the form it was given, None if it was left as it was.
        rank: its rank in that form.
        execution: how it runs on this machine.
        forced: whether that was set, by the user or because it was timed to be faster, so that it runs in this way on
            every machine. Otherwise its execution is ``auto``.
        why: the reasons for this choice, in words.
        weight_error: relative Frobenius error of the filter.
        fit_error: relative error of the layer's output on training images when it was fitted; None without data.
        milliseconds: of the layer alone, as given and as converted, measured in turns; None if the execution was not
            chosen by time.
        parameters: of the layer, before and after (:func:`gconv.cost`).
        macs_published: multiply-accumulates of one image in the published convention, before and after.
        macs_executed: multiply-accumulates of one image as executed, before and after.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    explained_energy: dict[str, list[float]]
    form: str | None
    rank: int | None
    why: str
    execution: str | None = None
    forced: bool = False
    weight_error: float = 0.0
    fit_error: float | None = None
    milliseconds: tuple[float, float] | None = None
    parameters: tuple[int, int] = (0, 0)
    macs_published: tuple[int, int] = (0, 0)
    macs_executed: tuple[int, int] = (0, 0)


@dataclass
class ConversionReport:
    """What a conversion did. Pairs are (before, after); everything is plain data after :meth:`to_dict`.

    Attributes:
        request: the form and budget that were asked for, and how they were met; ``compared_by`` says which error of
            the options was minimised, if a budget was shared out.
        layers: one row per group-to-group layer.
        parameters: of the whole network (:func:`gconv.cost`).
        macs_published: multiply-accumulates of one image in the published convention.
        macs_executed: multiply-accumulates of one image as executed.
        output_error: relative error of the class scores on seeded random images, before any fine-tuning.
        equivariance_error: for one seeded random image the largest relative change of the class scores over the group,
            in float64. It is at rounding level if the network is invariant.
        latency: median milliseconds of a batch, and how they were measured. ``process`` says by which process: under a
            latency budget by a new one that loads both networks (:mod:`analysis.latency.isolated`), else by the
            converting one. ``original`` lists the times of the original network whenever it was measured, which shows
            how steady the machine's speed was.
        memory: peak bytes of the live tensors in a forward pass of one image, besides weights and input.
        accuracy: error in per cent at each stage on the test images; on validation images under ``validation``.
        sensitivity: the options of each layer with their measured errors, to be used again
            (:func:`analysis.allocation.sensitivity.to_table`); None if they were not measured.
        refinement_steps: how many steps each fitted layer was refined for; 0 if it was not refined.
        finetuning: recipe and history; None without fine-tuning.
        notes: what was not measured, and why.
        kernel: whether the compiled kernels ran, and which (:func:`gconv.kernels.config.kernel_config`); the MACs as
            executed and the times hold for such a machine.
    """

    request: dict[str, Any]
    layers: list[LayerReport]
    parameters: tuple[int, int] = (0, 0)
    macs_published: tuple[int, int] = (0, 0)
    macs_executed: tuple[int, int] = (0, 0)
    output_error: float = 0.0
    equivariance_error: tuple[float, float] = (0.0, 0.0)
    latency: dict[str, Any] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    accuracy: dict[str, Any] = field(default_factory=dict)
    sensitivity: dict[str, Any] | None = None
    refinement_steps: int = 0
    finetuning: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    kernel: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``report.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionReport:
        """The report that :meth:`to_dict` described."""
        return cls(**{**data, "layers": [LayerReport(**row) for row in data["layers"]]})

    def measure(self, before: nn.Module, after: nn.Module, input_shape: Sequence[int], seed: int) -> None:
        """Fill in costs, equivariance errors, latency and memory, and each layer's row, from two networks in eval mode.

        Everything is measured on these networks, so the report on a network loaded from a file is about the file.
        """
        self.kernel = kernel_config()
        costs = [cost(network, input_shape) for network in (before, after)]
        rows = [{row.name: row for row in total.layers} for total in costs]
        for key in ("parameters", "macs_published", "macs_executed"):
            setattr(self, key, tuple(getattr(total, key) for total in costs))
            for layer in self.layers:
                setattr(layer, key, tuple(getattr(row[layer.name], key) for row in rows))
        for text in costs[1].notes:
            self.note(text)
        for layer in self.layers:
            self._describe(layer, before.get_submodule(layer.name), after.get_submodule(layer.name))
        images = random_images(before, input_shape, seed)
        one = images[:1].double()
        doubled = (copy.deepcopy(network).double() for network in (before, after))
        group = next(module.group for module in before.modules() if isinstance(module, (GConv2d, SeparableGConv2d)))
        first, second = (equivariance_error(network, group, one) for network in doubled)
        self.equivariance_error = (first.max, second.max)
        if first.max > _ROUNDING:
            self.note(
                "the network as given is not invariant: a stride does not fit its map, or its head is not invariant"
            )
            for inexact in first.inexact:
                self.note(str(inexact))
        if self.request.get("budget") == "latency":
            original = self.latency.get("original", [])
            self.latency = fresh_latency(before, after, images, self.note, known=min(original, default=math.inf))
            self.latency["original"] = [*original, self.latency["milliseconds"][0]]
            self._compare_with_budget()
        else:
            self.latency = {**latency(before, after, images), "process": "converting"}
        self.memory = (forward_memory(before, images[:1]), forward_memory(after, images[:1]))

    def _compare_with_budget(self) -> None:
        """Add a note if the saved network, measured again, takes longer than the budget that it met when chosen."""
        if "value" in self.request:
            before, after = self.latency["milliseconds"]
            limit = self.request["value"] * (before if self.request["fraction"] else 1)
            if after > limit:
                self.note(
                    f"measured again, the network takes {after:.3g} ms. When it was chosen it was within the budget of "
                    f"{limit:.3g} ms: the machine's speed has changed in between"
                )

    def measure_output(self, before: nn.Module, after: nn.Module, input_shape: Sequence[int], seed: int) -> None:
        """Fill in the error of the class scores.

        Raises:
            InputError: scores are NaN or infinite.
        """
        images = random_images(before, input_shape, seed)[:_OUTPUT_IMAGES]
        with torch.no_grad():
            expected, got = before(images).double(), after(images).double()
        for network, scores in (("network as given", expected), ("converted network", got)):
            if not torch.isfinite(scores).all():
                raise InputError(f"the class scores of the {network} are NaN or infinite on random images in [0, 1)")
        norm, difference = expected.norm().item(), (got - expected).norm().item()
        self.output_error = difference / norm if norm else difference

    def _describe(self, row: LayerReport, before: nn.Module, after: nn.Module) -> None:
        assert isinstance(before, (GConv2d, SeparableGConv2d)) and isinstance(after, (GConv2d, SeparableGConv2d))
        row.weight_error = relative_weight_error(after.weight, before.weight)
        if isinstance(after, SeparableGConv2d):
            row.execution, row.forced = after.resolved_execution, after.execution != "auto"
        if row.form is not None:
            assert isinstance(after, SeparableGConv2d)
            row.form, row.rank = after.form.name, after.rank

    def note(self, text: str) -> None:
        """Add a note, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)


def random_images(model: nn.Module, input_shape: Sequence[int], seed: int) -> Tensor:
    """The seeded random images that a report is measured on, on the model's device and with its type."""
    images = torch.rand(BATCH, *input_shape, generator=torch.Generator().manual_seed(seed))
    return images.to(next(model.parameters()))


def relative_weight_error(value: Tensor, reference: Tensor) -> float:
    """The Frobenius norm of the difference, relative to that of the reference."""
    norm = reference.double().norm().item()
    return (value.double() - reference.double()).norm().item() / norm if norm else 0.0
