"""Planning: the form and rank of each layer, so that the whole network is within its budget."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from analysis.allocation.allocators import Option, Problem, allocate, reachable
from analysis.allocation.options import Choice, choose, energy_curves, executed_macs, smaller_options
from analysis.allocation.sensitivity import OF_FILTERS, OF_SCORES, Options, measurable, measure_options, to_table
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.latency.isolated import fresh_latency
from analysis.latency.timing import layer_inputs
from gconv.functional.forms import FORMS
from gconv.models.cost import cost
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.training.evaluation import evaluate

from .autotune import timed_options
from .builder import Built, Plan, build
from .layers import replace_layer
from .report import ConversionReport, random_images
from .request import Request

_ROUNDS = 6  # of tightening a limit of time until the measured time is within it
_SAFELY = 0.97  # share of a limit of time; a network within it is still within the limit when measured again
_TRIALS = 6  # networks that are tried for a largest drop
_UNITS = {"params": "parameters", "macs": "macs", "latency": "milliseconds"}


class Planner:
    """Finds a plan for a request, and enters into the report how it was found.

    Attributes:
        request: the request.
        report: its ``sensitivity``, ``request`` and ``notes`` are filled in.
        curves: for each layer and form the share of energy that rank 1, 2, … keeps.
    """

    def __init__(self, request: Request, report: ConversionReport) -> None:
        self.request, self.report = request, report
        self.layers = request.layers
        self.positions = {name: runs.positions for name, runs in request.runs.items()}
        self.curves = {name: energy_curves(layer) for name, layer in self.layers.items()}

    def built(self) -> tuple[Plan, Built]:
        """The plan, and the network that was built by it.

        Raises:
            InputError: the budget cannot be met.
        """
        kind = self.request.budget.kind
        if kind == "max_drop":
            return self._search()
        by_layer = kind in ("rank", "energy")
        plan = {name: self._choice(name) for name in self.layers} if by_layer else self._plan()
        return plan, build(self.request, plan)

    def _choice(self, name: str) -> Choice:
        """The choice for one layer under a budget that holds for every layer."""
        if name in self.request.shared:
            return Choice(None, self.request.shared[name])
        layer, curves = self.layers[name], self.curves[name]
        return choose(layer, curves, self.request.forms, self.request.budget, self.positions[name])

    def measured(self) -> Options:
        """The options of every layer; if there is data, with measured errors.

        What the errors are is entered into the report, as ``request["compared_by"]``.
        """
        request, report = self.request, self.report
        if request.options is not None:
            options, compared_by = request.options, request.compared_by or "not recorded"
        else:
            options, compared_by = self._measured_now()
            report.sensitivity = {
                **to_table(request.before, options),
                "forms": [form.name for form in request.forms],
                "minimise": request.to_dict()["minimise"],
                "compared_by": compared_by,
            }
        report.request["compared_by"] = compared_by
        allowed = {form.name for form in request.forms}
        return {
            name: (own[0], *(self._as_executed(name, o) for o in own[1:] if o.form in allowed))
            for name, own in options.items()
        }

    def _measured_now(self) -> tuple[Options, str]:
        """The options of every layer, and what their errors are."""
        request, train = self.request, self.request.splits.train
        options = {
            name: smaller_options(
                layer, self.curves[name], () if name in request.shared else request.forms, self.positions[name]
            )
            for name, layer in self.layers.items()
        }
        if not request.outputs:
            return options, OF_FILTERS
        assert train is not None
        if not measurable(request.before, options):
            self.report.note("options were compared by the energy of their filters: fitting each is too much work")
            return options, OF_FILTERS
        measured = measure_options(request.before, options, train, request.splits.validation, request.seed)
        if measured.compared_by != OF_SCORES:
            self.report.note(
                "options were compared by their own layers' outputs: running the network with each is too much work"
            )
        return measured.options, measured.compared_by

    def _as_executed(self, name: str, option: Option) -> Option:
        """The option with the execution that was asked for, and its MACs."""
        if self.request.execution == "auto":
            return option
        assert option.form is not None and option.rank is not None
        form, layer = FORMS[option.form], self.layers[name]
        macs = executed_macs(layer, form, option.rank, self.request.execution, self.positions[name])
        return replace(option, execution=self.request.execution, macs=macs)

    def _plan(self) -> Plan:
        """The choice for each layer under a budget for the whole network."""
        options = self.measured()
        if self.request.budget.kind == "latency":
            return self._plan_latency(options)
        unit = _UNITS[self.request.budget.kind]
        total = self.request.costs.parameters if unit == "parameters" else self.request.costs.macs_executed
        return self._share_out(options, unit, self.request.budget.limit(total), total)

    def _share_out(self, options: Options, unit: str, limit: float, total: float) -> Plan:
        """Share out a limit on the whole network. What cannot be converted is subtracted first."""
        fixed = total - sum(getattr(own[0], unit) for own in options.values())
        problem = Problem(tuple(options.values()), unit, limit - fixed)
        least = fixed + reachable(problem)
        if least > limit * (1 + 1e-9):
            # Rounded up, so that what is named can be met.
            ms = "ms" if unit == "milliseconds" else ""
            shown = f"{math.ceil(least * 1e3) / 1e3:.3f}ms" if ms else f"{least:,.0f}"
            raise InputError(
                f"{self.request.budget.kind} of at most {limit:,.6g}{ms} is out of reach "
                f"with form {self.request.form}. "
                f"Give at least {shown}, or {min(1.0, least / total + 5e-5):.4f} of the network."
            )
        chosen, why = allocate(problem, self.request.allocation)
        self.report.request |= {"limit": limit, "allocation_why": why}
        return {
            name: Choice(own[n], why) if n else self._unchanged(name, "left as it is within the budget")
            for (name, own), n in zip(options.items(), chosen, strict=True)
        }

    def _unchanged(self, name: str, why: str) -> Choice:
        """A layer that stays as it is, and why."""
        return Choice(None, self.request.shared.get(name, why))

    def _plan_latency(self, options: Options) -> Plan:
        """Share out measured milliseconds, and tighten until the whole network is measured to be safely within them.

        If no plan is safely within the limit, one that is barely within it is taken.
        """
        request, budget = self.request, self.request.budget
        inputs = layer_inputs(request.before, list(options), request.size)
        timed = timed_options(self.layers, options, inputs, request.runs, request.execution)
        images = random_images(request.before, request.size, request.seed)
        reached: list[float] = []
        barely: tuple[Plan, dict[str, Any]] | None = None
        factor = 1.0
        before, _ = self._milliseconds(request.before, images)
        for _ in range(_ROUNDS):
            target = budget.limit(before)
            try:
                plan = self._share_out(timed, "milliseconds", factor * target, before)
            except InputError:
                if not reached:
                    raise
                break
            before, after = self._milliseconds(self._probe(plan), images)
            target = budget.limit(before)
            if after <= target:
                self.report.request["limit"] = target
                if after <= _SAFELY * target or not any(choice.option for choice in plan.values()):
                    return plan
                barely = barely or (plan, dict(self.report.request))
            reached.append(after / before)
            factor *= 0.98 * min(target / after, 1.0)
        if barely is not None:
            plan, self.report.request = barely
            return plan
        nearest = min(reached)
        raise InputError(
            f"latency of {budget.value:g}{'' if budget.fraction else 'ms'} is out of reach here. "
            f"The nearest that was measured is {nearest:.3f} of the network's."
        )

    def _probe(self, plan: Plan) -> nn.Module:
        """A network that takes the time of the planned one; its filters come from a plain SVD, which is quick."""
        probe = copy.deepcopy(self.request.before)
        for name, choice in plan.items():
            if (option := choice.option) is not None:
                assert option.form is not None and option.rank is not None
                layer = SeparableGConv2d.from_dense(self.layers[name], option.form, option.rank, option.execution)
                replace_layer(probe, name, layer)
        return probe

    def _milliseconds(self, network: nn.Module, images: Tensor) -> tuple[float, float]:
        """What the network as given and another one take for a batch in a new process."""
        before, after = fresh_latency(self.request.before, network, images, self.report.note)["milliseconds"]
        self.report.latency.setdefault("original", []).append(before)
        return before, after

    def _search(self) -> tuple[Plan, Built]:
        """Look for the fewest parameters whose measured drop on validation is allowed, by halving their range.

        The drop need not grow as parameters fall, so there may be a smaller network than those tried.
        """
        request, (train, validation, _) = self.request, self.request.splits
        assert train is not None and validation is not None
        options, total = self.measured(), request.costs.parameters
        error = evaluate(request.before, validation).error
        low = float(total - sum(own[0].parameters - min(o.parameters for o in own) for own in options.values()))
        high = float(total)
        unchanged = {name: self._unchanged(name, "any conversion that was tried loses more") for name in options}
        best = unchanged, Built(copy.deepcopy(request.before))
        tried = []
        limit = low
        for _ in range(_TRIALS):
            plan = self._share_out(options, "parameters", limit, total)
            built = build(request, plan)
            reestimate_batchnorm(built.network, train.images)
            drop = evaluate(built.network, validation, label=f"trying {limit:,.0f} parameters").error - error
            tried.append({"parameters": cost(built.network, request.size).parameters, "drop": drop})
            if drop <= request.budget.value:
                best, high = (plan, built), min(limit, tried[-1]["parameters"])
            else:
                low = limit
            if high - low < 0.01 * total:
                break
            limit = (low + high) / 2
        self.report.request["tried"] = tried
        return best
