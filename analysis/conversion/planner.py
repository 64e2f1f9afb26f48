"""Planning: which form and rank each layer gets, so that the network as a whole is within its budget."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from analysis.allocation.allocators import Option, Problem, allocate, reachable
from analysis.allocation.options import Choice, choose, energy_curves, executed_macs, smaller_options
from analysis.allocation.sensitivity import Options, measurable, measure_options, to_table
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
from .report import ConversionReport, random_images
from .request import Request

_ROUNDS = 6  # of tightening a limit of time until the measured time is within it
_SAFELY = 0.97  # of a limit of time, so that it holds when measured again
_TRIALS = 6  # halvings of the range of parameters in search of the largest drop allowed
_UNITS = {"params": "parameters", "macs": "macs", "latency": "milliseconds"}


class Planner:
    """Finds a plan for a request, and enters into the report how.

    Attributes:
        request: the request.
        report: its ``sensitivity``, ``request`` and ``notes`` are filled in.
        curves: for each layer and form the share of energy kept at rank 1, 2, ….
    """

    def __init__(self, request: Request, report: ConversionReport) -> None:
        self.request, self.report = request, report
        self.layers = request.layers
        self.positions = {row.name: row.positions for row in request.costs.layers}
        self.curves = {name: energy_curves(layer) for name, layer in self.layers.items()}

    def built(self) -> tuple[Plan, Built]:
        """The plan, and the network that was built by it.

        Raises:
            InputError: the budget cannot be met.
        """
        kind = self.request.budget.kind
        if kind == "max_drop":
            return self._search()
        if kind in ("rank", "energy"):
            plan = {
                name: choose(layer, self.curves[name], self.request.forms, self.request.budget, self.positions[name])
                for name, layer in self.layers.items()
            }
        else:
            plan = self._plan()
        return plan, build(self.request, plan)

    def measured(self) -> Options:
        """The options of every layer, their errors measured if there is data."""
        request, report = self.request, self.report
        if request.options is not None:
            options = request.options
        else:
            options = {
                name: smaller_options(layer, self.curves[name], request.forms, self.positions[name])
                for name, layer in self.layers.items()
            }
            if request.outputs and not measurable(request.before, options):
                report.notes.append(
                    "options were compared by the energy of their filters: fitting each of them would take too long"
                )
            elif request.outputs:
                assert request.train is not None
                options = measure_options(request.before, options, request.train, request.validation, request.seed)
            about = {"forms": [form.name for form in request.forms], "minimise": request.to_dict()["minimise"]}
            report.sensitivity = {**to_table(request.before, options), **about}
        allowed = {form.name for form in request.forms}
        return {
            name: (own[0], *(self._as_executed(name, o) for o in own[1:] if o.form in allowed))
            for name, own in options.items()
        }

    def _as_executed(self, name: str, option: Option) -> Option:
        """The option with the execution that was asked for, and its MACs."""
        if self.request.execution == "auto":
            return option
        assert option.form is not None and option.rank is not None
        form, layer = FORMS[option.form], self.layers[name]
        macs = executed_macs(layer, form, option.rank, self.request.execution, self.positions[name])
        return replace(option, execution=self.request.execution, macs=macs)

    def _plan(self) -> Plan:
        """The choice for every layer under a budget for the whole network."""
        options = self.measured()
        if self.request.budget.kind == "latency":
            return self._plan_latency(options)
        unit = _UNITS[self.request.budget.kind]
        total = self.request.costs.parameters if unit == "parameters" else self.request.costs.macs_executed
        return self._share_out(options, unit, self.request.budget.limit(total), total)

    def _share_out(self, options: Options, unit: str, limit: float, total: float) -> Plan:
        """Allocate a limit on the whole network; what cannot be converted is paid for first."""
        fixed = total - sum(getattr(own[0], unit) for own in options.values())
        problem = Problem(tuple(options.values()), unit, limit - fixed)
        least = fixed + reachable(problem)
        if least > limit * (1 + 1e-9):
            # Rounded up, so that what is named will be accepted.
            ms = "ms" if unit == "milliseconds" else ""
            shown = f"{math.ceil(least * 1e3) / 1e3:.3f}ms" if ms else f"{least:,.0f}"
            raise InputError(
                f"{self.request.budget.kind} of at most {limit:,.6g}{ms} is out of reach "
                f"with form {self.request.form}; "
                f"accepted: at least {shown}, or {min(1.0, least / total + 5e-5):.4f} of the network"
            )
        chosen, why = allocate(problem, self.request.allocation)
        self.report.request |= {"limit": limit, "allocation_why": why}
        return {
            name: Choice(own[n] if n else None, why if n else "left as it is within the budget")
            for (name, own), n in zip(options.items(), chosen, strict=True)
        }

    def _plan_latency(self, options: Options) -> Plan:
        """Allocate measured milliseconds, and tighten until the whole network is measured to be safely within them.

        One that is barely within is taken where no other is.
        """
        request, budget = self.request, self.request.budget
        inputs = layer_inputs(request.before, list(options), request.size)
        timed = timed_options(self.layers, options, inputs, request.execution)
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
            probe = copy.deepcopy(request.before)
            for name, choice in plan.items():
                if (option := choice.option) is not None:
                    assert option.form is not None and option.rank is not None
                    layer = SeparableGConv2d.from_dense(self.layers[name], option.form, option.rank, option.execution)
                    probe.set_submodule(name, layer)
            before, after = self._milliseconds(probe, images)
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
            f"latency of {budget.value:g}{'' if budget.fraction else 'ms'} is out of reach here; "
            f"the nearest that was measured is {nearest:.3f} of the network's"
        )

    def _milliseconds(self, network: nn.Module, images: Tensor) -> tuple[float, float]:
        """Of a batch, by the network as given and by another one, as a new process takes."""
        before, after = fresh_latency(self.request.before, network, images, self.report.note)["milliseconds"]
        self.report.latency.setdefault("original", []).append(before)
        return before, after

    def _search(self) -> tuple[Plan, Built]:
        """The fewest parameters whose measured drop on validation is allowed, by halving the range of parameters.

        The drop need not grow as parameters fall, so there may be a smaller network than those tried.
        """
        request = self.request
        assert request.train is not None and request.validation is not None
        options, total = self.measured(), request.costs.parameters
        error = evaluate(request.before, request.validation).error
        low = float(total - sum(own[0].parameters - min(o.parameters for o in own) for own in options.values()))
        high = float(total)
        unchanged = {name: Choice(None, "any conversion that was tried loses more") for name in options}
        best = unchanged, Built(copy.deepcopy(request.before))
        tried = []
        limit = low
        for _ in range(_TRIALS):
            plan = self._share_out(options, "parameters", limit, total)
            built = build(request, plan)
            reestimate_batchnorm(built.network, request.train.images)
            drop = evaluate(built.network, request.validation, label=f"trying {limit:,.0f} parameters").error - error
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
