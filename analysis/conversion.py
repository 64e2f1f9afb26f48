"""Convert a trained network into the best separable one within a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gconv.checkpoint import apply_choices, layer_choices
from gconv.conv import GConv2d, SeparableGConv2d
from gconv.cost import Cost, cost
from gconv.data import Split
from gconv.errors import InputError, one_of
from gconv.evaluation import evaluate
from gconv.separable import EXECUTIONS, FORMS, Form, check_execution

from .allocation import Choice, choose, energy_curves, executed_macs, forms_named, smaller_options
from .allocators import ALLOCATORS, Option, Problem, allocate, reachable
from .batchnorm import reestimate_batchnorm
from .budget import Budget
from .execution import faster_execution, latency, layer_inputs, layer_times
from .finetuning import Distillation, finetune
from .fitting import fit
from .moments import channel_weights, collect_moments, passes
from .refinement import refine, refinement_steps
from .report import ConversionReport, LayerReport, random_images
from .sensitivity import Options, fingerprint, from_table, measurable, measure_options, to_table

Network = TypeVar("Network", bound=nn.Module)
MINIMISE = ("auto", "weights", "outputs")
_IMAGES = 4000  # training images that layers are fitted on; the statistics of batch norm come from all
_PATCHES = 100_000
_WEIGHT_IMAGES = 512  # for what an error in each channel costs
_BATCHNORM_IMAGES = 2000  # between the layers; at the end all
_PASSES = 8  # at most so many groups of layers are fitted one after the other
_PASSES_WORK = 2 * 10**13  # multiply-accumulates of their forward passes together; large networks take fewer groups
_ROUNDS = 6  # of tightening a limit of time until the measured time is within it
_TRIALS = 6  # halvings of the range of parameters in search of the largest drop allowed
_UNITS = {"params": "parameters", "macs": "macs", "latency": "milliseconds"}


def convert(
    model: Network,
    form: str = "auto",
    *,
    rank: int | None = None,
    energy: float | None = None,
    params: float | str | None = None,
    macs: float | str | None = None,
    latency: float | str | None = None,
    max_drop: float | None = None,
    allocation: str = "auto",
    minimise: str = "auto",
    execution: str = "auto",
    data: Split | Iterable[tuple[Tensor, Tensor]] | None = None,
    validation: Split | None = None,
    test: Split | None = None,
    finetune: int = 0,
    distillation: Distillation = Distillation(),
    sensitivity: Any = None,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
    saved: Callable[[Network], Network] | None = None,
    after_epoch: Callable[[dict[str, Any]], None] = lambda state: None,
    resume: dict[str, Any] | None = None,
) -> tuple[Network, ConversionReport]:
    """Replace a network's group-to-group layers by separable ones within a budget; fine-tune if asked.

    With ``data`` every layer is fitted to the *output* that it had in the original network, reading what the converted
    layers before it give (:mod:`analysis.fitting`), and then refined behind its batch norm and ReLU
    (:mod:`analysis.refinement`); without, to its filter by a truncated SVD. The network stays
    equivariant whatever the budget. Lifting and 1x1 layers are left alone.

    Args:
        model: a trained network with layers of this package; it is not changed.
        form: of every layer, one of ``gconv.FORMS``; or ``auto``, the best for each.
        rank: the rank of every layer (or the layer's largest, if that is smaller).
        energy: the share of its energy that every layer keeps, at the smallest rank that does (default 0.95).
        params: parameters of the whole network: a fraction up to 1, or a number.
        macs: multiply-accumulates of one image as executed: likewise.
        latency: of a batch of 16 on this machine: a fraction up to 1, or a time such as ``"3.5ms"``.
        max_drop: points of accuracy that may be lost on ``validation`` before fine-tuning; the smallest network that
            was tried wins.
        allocation: how params, macs or latency are shared out: ``auto`` or one of ``analysis.ALLOCATORS``.
        minimise: ``outputs`` (needs data), ``weights``, or ``auto``: outputs if there is data.
        execution: ``dense``, ``factorized`` or ``irrep`` for every layer; ``auto``: what is measured to be fastest,
            except that under ``macs`` every layer runs as its MACs were counted.
        data: training images with labels, a :class:`gconv.Split` or a loader of batches: layers are fitted on them,
            batch norm is re-estimated, and fine-tuning learns from them.
        validation: images that the network was not trained on: options are compared on them, if given.
        test: images on which the error is reported at every stage. Nothing is chosen by them.
        finetune: epochs of further training, with the original network as teacher; needs ``data``.
        distillation: the loss of that training.
        sensitivity: ``report.sensitivity`` of an earlier conversion of this network, not to be measured again.
        seed: of the choice of images, the fine-tuning's data order, and the random images in the report.
        input_shape: of one image; by default the model's own or that of ``data``.
        saved: saves the network and returns it as loaded back: then the report is of the file.
        after_epoch: called after every epoch of fine-tuning with all that a continuation needs, as plain data.
        resume: what ``after_epoch`` was given last in an interrupted call with the same arguments.

    Returns:
        The new network in eval mode, and the report.

    Raises:
        InputError: several budgets or one that cannot be met (the nearest that can is named), a value out of range, an
            unknown name, a network without a layer to convert, weights that are not finite, or data that is missing or
            does not fit the network.
    """
    budget = Budget.of(rank=rank, energy=energy, params=params, macs=macs, latency=latency, max_drop=max_drop)
    job = _Job.checked(
        model, form, budget, allocation, minimise, execution, data, validation, test, sensitivity, seed, input_shape
    )
    if not isinstance(finetune, int) or isinstance(finetune, bool) or finetune < 0:
        raise InputError(f"finetune is {finetune!r}; accepted: a whole number of epochs")
    if finetune and job.train is None:
        raise InputError("fine-tuning needs training images; accepted: data")
    if resume is not None and not finetune:
        raise InputError("resume continues fine-tuning; accepted: the arguments of the interrupted call, as they were")
    job.training = {"epochs": finetune, "seed": seed, "distillation": asdict(distillation)}
    resume = copy.deepcopy(resume)  # training on would change its tensors
    final = final_stage(job.train, finetune)
    after: Any = job.run(final) if resume is None else job.resumed(resume)
    report = job.report
    if finetune:
        job.finetune(after, finetune, distillation, resume, after_epoch)
    if execution == "auto" and budget.kind != "macs":
        job.choose_executions(after)
    if saved is not None:
        after = saved(after)
    score(report, final, after, validation, test)
    report.measure(job.before, after, job.size, seed)
    return after, report


def to_dense(model: Network) -> Network:
    """A copy of the network with every separable layer folded back to a full one; same output to rounding."""
    dense = copy.deepcopy(model)
    for name, layer in group_layers(dense).items():
        if isinstance(layer, SeparableGConv2d):
            dense.set_submodule(name, layer.to_dense())
    return dense


def final_stage(train: Split | None, epochs: int) -> str:
    """The last of the stages that a conversion goes through."""
    return "finetuned" if epochs else "converted" if train is None else "batch_norm"


def score(
    report: ConversionReport, stage: str, network: nn.Module, validation: Split | None, test: Split | None
) -> None:
    """Enter the network's error on validation and test images under the name of a stage."""
    if validation is not None:
        own = report.accuracy.setdefault("validation", {"images": len(validation.labels)})
        own[stage] = evaluate(network, validation, label=f"validating ({stage})").error
    if test is not None:
        report.accuracy["test_images"] = len(test.labels)
        report.accuracy[stage] = evaluate(network, test, label=f"testing ({stage})").error


def group_layers(model: nn.Module) -> dict[str, GConv2d | SeparableGConv2d]:
    """The layers from group to group by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (GConv2d, SeparableGConv2d))}


Plan = dict[str, Choice]


@dataclass
class _Job:
    """One conversion: what is asked for, checked, and what was found out on the way."""

    before: nn.Module
    size: Sequence[int]
    costs: Cost
    forms: tuple[Form, ...]
    budget: Budget
    allocation: str
    outputs: bool
    execution: str
    train: Split | None
    validation: Split | None
    test: Split | None
    seed: int
    request: dict[str, Any]
    report: ConversionReport
    options: Options | None = None
    training: dict[str, Any] | None = None

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
    ) -> _Job:
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
        request = {
            "form": form.lower(),
            **budget.to_dict(),
            "allocation": allocation,
            "minimise": "outputs" if outputs else "weights",
            "execution": execution,
        }
        job = cls(
            before, size, costs, forms, budget, allocation, outputs, execution,
            train, validation, test, seed, request, ConversionReport(dict(request), []),
        )  # fmt: skip
        if sensitivity is not None:
            job.options = from_table(before, sensitivity)
            _check_measured(sensitivity, forms, outputs)
            job.report.sensitivity = sensitivity
        return job

    def run(self, final: str) -> nn.Module:
        """Plan and build; with data re-estimate batch norm; score the stages before the final one."""
        curves = {name: energy_curves(layer) for name, layer in self.layers.items()}
        score(self.report, "before", self.before, self.validation, self.test)
        if self.test is None and self.validation is None:
            self.report.notes.append("accuracy was not measured: no test images were given (--data)")
        if self.budget.kind in ("rank", "energy"):
            positions = {row.name: row.positions for row in self.costs.layers}
            plan = {
                name: choose(layer, curves[name], self.forms, self.budget, positions[name])
                for name, layer in self.layers.items()
            }
            after, errors = self.build(plan)
        elif self.budget.kind == "max_drop":
            plan, after, errors = self.search(curves)
        else:
            plan = self.plan(curves)
            after, errors = self.build(plan)
        for name, layer in self.layers.items():
            option = plan[name].option
            form, rank = (option.form, option.rank) if option else (None, None)
            shape, error = tuple(layer.weight.shape), errors.get(name)
            row = LayerReport(name, layer.group.name, shape, curves[name], form, rank, plan[name].why, fit_error=error)
            self.report.layers.append(row)
        converted = any(row.form is not None for row in self.report.layers)
        if not converted:
            self.report.notes.append("nothing was converted, the layers are as given; a lower budget or one form may")
        self.report.measure_output(self.before, after, self.size, self.seed)
        if final != "converted":
            score(self.report, "converted", after, self.validation, self.test)
        if self.train is None:
            self.report.notes.append("batch norm was not re-estimated: no training images were given (--data)")
        else:
            if converted:  # else the network stays as it is, to the bit
                reestimate_batchnorm(after, self.train.images)
            if final != "batch_norm":
                score(self.report, "batch_norm", after, self.validation, self.test)
        return after

    def resumed(self, state: dict[str, Any]) -> nn.Module:
        """The network that an interrupted fine-tuning had, and its report.

        Raises:
            InputError: it is not the state of a conversion with these arguments.
        """
        after = copy.deepcopy(self.before)
        try:
            if state["original"] != fingerprint(self.before) or state["request"] != self.request:
                raise InputError("the interrupted fine-tuning was of another network or another budget")
            if state["training"] != self.training:
                raise InputError("the interrupted fine-tuning had other epochs, another seed or another loss")
            apply_choices(after, state["layers"])
            after.load_state_dict(state["state_dict"])
            self.report = ConversionReport.from_dict(state["report"])
            if len(state["history"]) != state["fit"]["epochs_done"]:
                raise InputError("the state of the interrupted fine-tuning is inconsistent: an epoch is missing")
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"the state of the interrupted fine-tuning is inconsistent: {error}") from error
        return after.eval()

    def finetune(
        self,
        after: nn.Module,
        epochs: int,
        distillation: Distillation,
        resume: dict[str, Any] | None,
        after_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        """Fine-tune in place; after every epoch the state goes out."""
        assert self.train is not None
        history: list[dict[str, Any]] = [] if resume is None else list(resume["history"])
        fixed = {
            "original": fingerprint(self.before),
            "request": self.request,
            "training": self.training,
            "layers": layer_choices(after),
        }

        def keep(row: dict[str, Any], fit_state: dict[str, Any]) -> None:
            history.append(row)
            state = {"report": self.report.to_dict(), "state_dict": after.state_dict(), "fit": fit_state}
            after_epoch(copy.deepcopy({**fixed, **state, "history": history}))  # the next epoch changes the tensors

        converted = [row.name for row in self.report.layers if row.form is not None]
        recipe = finetune(
            after,
            self.before,
            converted,
            self.train,
            epochs=epochs,
            seed=self.seed,
            distillation=distillation,
            resume=None if resume is None else resume["fit"],
            after_epoch=keep,
        )
        self.report.finetuning = {**recipe, "history": history}
        after.eval()

    @property
    def layers(self) -> dict[str, GConv2d | SeparableGConv2d]:
        """In the order in which they run."""
        layers = group_layers(self.before)
        return {row.name: layers[row.name] for row in self.costs.layers if row.name in layers}

    # --- planning

    def measured(self, curves: dict[str, dict[str, list[float]]]) -> Options:
        """The options of every layer, their errors measured if there is data."""
        if self.options is None:
            positions = {row.name: row.positions for row in self.costs.layers}
            self.options = {
                name: smaller_options(layer, curves[name], self.forms, positions[name])
                for name, layer in self.layers.items()
            }
            if self.outputs and not measurable(self.before, self.options):
                self.report.notes.append(
                    "options were compared by the energy of their filters: fitting each of them would take too long"
                )
            elif self.outputs:
                assert self.train is not None
                self.options = measure_options(self.before, self.options, self.train, self.validation, self.seed)
            about = {"forms": [form.name for form in self.forms], "minimise": self.request["minimise"]}
            self.report.sensitivity = {**to_table(self.before, self.options), **about}
        allowed = {form.name for form in self.forms}
        return {
            name: (own[0], *(self.as_executed(name, o) for o in own[1:] if o.form in allowed))
            for name, own in self.options.items()
        }

    def as_executed(self, name: str, option: Option) -> Option:
        """The option with the execution that was asked for, and its MACs."""
        if self.execution == "auto":
            return option
        assert option.form is not None and option.rank is not None
        form, layer = FORMS[option.form], self.layers[name]
        positions = next(row.positions for row in self.costs.layers if row.name == name)
        return replace(
            option, execution=self.execution, macs=executed_macs(layer, form, option.rank, self.execution, positions)
        )

    def plan(self, curves: dict[str, dict[str, list[float]]]) -> Plan:
        """The choice for every layer under a budget for the whole network."""
        options = self.measured(curves)
        if self.budget.kind == "latency":
            return self.plan_latency(options)
        unit = _UNITS[self.budget.kind]
        total = self.costs.parameters if unit == "parameters" else self.costs.macs_executed
        return self.share_out(options, unit, self.budget.limit(total), total)

    def share_out(self, options: Options, unit: str, limit: float, total: float) -> Plan:
        """Allocate a limit on the whole network; what cannot be converted is paid for first."""
        fixed = total - sum(getattr(own[0], unit) for own in options.values())
        problem = Problem(tuple(options.values()), unit, limit - fixed)
        least = fixed + reachable(problem)
        if least > limit * (1 + 1e-9):
            # Rounded up, so that what is named will be accepted.
            ms = "ms" if unit == "milliseconds" else ""
            shown = f"{math.ceil(least * 1e3) / 1e3:.3f}ms" if ms else f"{least:,.0f}"
            raise InputError(
                f"{self.budget.kind} of at most {limit:,.6g}{ms} is out of reach with form "
                f"{self.report.request['form']}; "
                f"accepted: at least {shown}, or {min(1.0, least / total + 5e-5):.4f} of the network"
            )
        chosen, why = allocate(problem, self.allocation)
        self.report.request |= {"limit": limit, "allocation_why": why}
        return {
            name: Choice(own[n] if n else None, why if n else "left as it is within the budget")
            for (name, own), n in zip(options.items(), chosen, strict=True)
        }

    def plan_latency(self, options: Options) -> Plan:
        """Allocate measured milliseconds, and tighten until the network as a whole is measured to be within them."""
        inputs = layer_inputs(self.before, list(options), self.size)
        timed = _timed_options(self.layers, options, inputs, self.execution)
        images = random_images(self.before, self.size, self.seed)
        reached: list[float] = []
        factor = 1.0
        for _ in range(_ROUNDS):
            total = _latency_of(self.before, self.before, images)[0]
            target = self.budget.limit(total)
            try:
                plan = self.share_out(timed, "milliseconds", factor * target, total)
            except InputError:
                if not reached:
                    raise
                break
            probe = copy.deepcopy(self.before)
            for name, choice in plan.items():
                if (option := choice.option) is not None:
                    assert option.form is not None and option.rank is not None
                    layer = SeparableGConv2d.from_dense(self.layers[name], option.form, option.rank, option.execution)
                    probe.set_submodule(name, layer)
            before, after = _latency_of(self.before, probe, images)
            target = self.budget.limit(before)
            if after <= target:
                self.report.request["limit"] = target
                return plan
            reached.append(after / before)
            factor *= 0.98 * target / after
        nearest = min(reached)
        raise InputError(
            f"latency of {self.budget.value:g}{'' if self.budget.fraction else 'ms'} is out of reach here; "
            f"the nearest that was measured is {nearest:.3f} of the network's"
        )

    def search(self, curves: dict[str, dict[str, list[float]]]) -> tuple[Plan, nn.Module, dict[str, float]]:
        """The fewest parameters whose measured drop on validation is allowed, by halving the range of parameters."""
        assert self.train is not None and self.validation is not None
        options, total = self.measured(curves), self.costs.parameters
        error = evaluate(self.before, self.validation).error
        low = float(total - sum(own[0].parameters - min(o.parameters for o in own) for own in options.values()))
        high = float(total)
        unchanged = {name: Choice(None, "any conversion that was tried loses more") for name in options}
        best: tuple[Plan, nn.Module, dict[str, float]] = unchanged, copy.deepcopy(self.before), {}
        tried = []
        limit = low
        for _ in range(_TRIALS):
            plan = self.share_out(options, "parameters", limit, total)
            after, errors = self.build(plan)
            reestimate_batchnorm(after, self.train.images)
            drop = evaluate(after, self.validation, label=f"trying {limit:,.0f} parameters").error - error
            tried.append({"parameters": cost(after, self.size).parameters, "drop": drop})
            if drop <= self.budget.value:
                best, high = (plan, after, errors), min(limit, tried[-1]["parameters"])
            else:
                low = limit
            if high - low < 0.01 * total:
                break
            limit = (low + high) / 2
        self.report.request["tried"] = tried
        return best

    # --- building

    def build(self, plan: Plan) -> tuple[nn.Module, dict[str, float]]:
        """The converted network, and the relative output error of each layer that was fitted."""
        after = copy.deepcopy(self.before)
        names = [name for name, choice in plan.items() if choice.option is not None]
        errors: dict[str, float] = {}
        if not self.outputs:
            for name in names:
                layer, (form, rank, execution) = self.layers[name], self.settings(plan[name])
                after.set_submodule(name, SeparableGConv2d.from_dense(layer, form, rank, execution))
            return after, errors
        assert self.train is not None
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(self.seed))
        images = self.train.images[order[:_IMAGES]]
        weights = channel_weights(self.before, names, images[:_WEIGHT_IMAGES], seed=self.seed) if names else {}
        forward = max(1, self.costs.macs_executed * len(images))
        number = max(1, min(_PASSES, _PASSES_WORK // (3 * forward)))  # inputs, outputs, and batch norm thereafter
        for group in passes(self.before, names, max(1, -(-len(names) // number))):
            moments = collect_moments(self.before, after, group, images, seed=self.seed, patches=_PATCHES)
            for name in group:
                layer, (form, rank, execution) = self.layers[name], self.settings(plan[name])
                fitted = fit(layer, FORMS[form], rank, moments.pop(name), weights=weights[name])
                errors[name] = fitted.error
                separable = SeparableGConv2d.from_factors(
                    layer, form, fitted.mix, fitted.spatial, fitted.bias, execution
                )
                after.set_submodule(name, separable)
            reestimate_batchnorm(after, images[:_BATCHNORM_IMAGES])
        if names:
            macs = self.costs.macs_executed + cost(after, self.size).macs_executed
            steps = refinement_steps(len(names), macs, len(self.train.labels))
            refine(self.before, after, names, self.train.images, steps, seed=self.seed)
            self.report.request["refinement_steps"] = steps
        return after, errors

    def settings(self, choice: Choice) -> tuple[str, int, str | None]:
        option = choice.option
        assert option is not None and option.form is not None and option.rank is not None
        return option.form, option.rank, option.execution if self.execution == "auto" else self.execution

    def choose_executions(self, after: nn.Module) -> None:
        """Run every converted layer the faster way, as measured here; once for layers of a kind."""
        rows = {row.name: row for row in self.report.layers if row.form is not None}
        inputs = layer_inputs(after, list(rows), self.size)
        known: dict[Any, Any] = {}
        for name, row in rows.items():
            layer, x = after.get_submodule(name), inputs[name]
            assert isinstance(layer, SeparableGConv2d)
            key = (layer.form.name, layer.rank, _kind(layer, x))
            if key not in known:
                known[key] = faster_execution(layer, x)
            layer.execution, times = known[key]
            execution = layer.execution
            row.milliseconds = times["dense"], times[execution]
            row.why += f"; {execution}: " + ", ".join(f"{ms:.2f} ms {way}" for way, ms in times.items())


def _timed_options(
    layers: dict[str, GConv2d | SeparableGConv2d], options: Options, inputs: dict[str, Tensor], execution: str
) -> Options:
    """The options with the milliseconds of the faster execution; layers of one shape on maps of one size share them."""
    known: dict[Any, Option] = {}
    timed: Options = {}
    for name, own in options.items():
        layer, x = layers[name], inputs[name]
        shape = _kind(layer, x)
        kind = layer.rank if isinstance(layer, SeparableGConv2d) else None
        rows = []
        for option in own:
            key = (shape, option.form, option.rank, kind if option.rank is None else None)
            if key not in known:
                known[key] = _timed(layer, option, x, execution)
            found = known[key]
            rows.append(replace(option, milliseconds=found.milliseconds, execution=found.execution, macs=found.macs))
        first = rows[0].milliseconds
        assert first is not None
        timed[name] = (rows[0], *(row for row in rows[1:] if row.milliseconds is not None and row.milliseconds < first))
    return timed


def _kind(layer: GConv2d | SeparableGConv2d, x: Tensor) -> tuple[Any, ...]:
    """What the time of a layer depends on, beside form and rank."""
    return layer.group.name, layer.filter_shape, layer.sampling, tuple(x.shape)


def _timed(layer: GConv2d | SeparableGConv2d, option: Option, x: Tensor, execution: str) -> Option:
    if option.rank is None:
        return replace(option, milliseconds=layer_times(layer, x)[0])
    assert option.form is not None
    with torch.random.fork_rng(devices=[]):
        separable = SeparableGConv2d.like(layer, option.form, option.rank)
    chosen, times = faster_execution(separable, x)
    chosen = chosen if execution == "auto" else check_execution(execution)
    return replace(option, execution=chosen, milliseconds=times[chosen])


def _latency_of(before: nn.Module, after: nn.Module, images: Tensor) -> tuple[float, float]:
    first, second = latency(before, after, images)["milliseconds"]
    return first, second


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
