"""Convert a trained network into the best separable one within a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from torch import Tensor, nn

from analysis.allocation.budget import Budget
from analysis.allocation.sensitivity import fingerprint
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.fitting.distillation import Distillation, finetune
from gconv.models.checkpoint import apply_choices, layer_choices
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.training.datasets import Split
from gconv.training.evaluation import evaluate

from .autotune import choose_executions
from .planner import Planner
from .report import ConversionReport, LayerReport
from .request import Request, group_layers

Network = TypeVar("Network", bound=nn.Module)


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
    layers before it give (:mod:`analysis.fitting.alternating`), and then refined behind its batch norm and ReLU
    (:mod:`analysis.fitting.reconstruction`); without, to its filter by a truncated SVD. The network stays
    equivariant whatever the budget. Lifting and 1x1 layers are left alone.

    Args:
        model: a trained network with layers of this package; it is not changed.
        form: of every layer, one of ``gconv.FORMS``; or ``auto``, the best for each.
        rank: the rank of every layer (or the layer's largest, if that is smaller).
        energy: the share of its energy that every layer keeps, at the smallest rank that does (default 0.95).
        params: parameters of the whole network: a fraction up to 1, or a number.
        macs: multiply-accumulates of one image as executed: likewise.
        latency: of a batch of 16 on this machine, as a new process measures it that only loads the networks: a fraction
            up to 1, or a time such as ``"3.5ms"``.
        max_drop: points of accuracy that may be lost on ``validation`` before fine-tuning; the smallest wins of the
            networks that are tried, which halve the range of parameters again and again.
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
    request = Request.checked(
        model, form, budget, allocation, minimise, execution, data, validation, test, sensitivity, seed, input_shape
    )
    if not isinstance(finetune, int) or isinstance(finetune, bool) or finetune < 0:
        raise InputError(f"finetune is {finetune!r}; accepted: a whole number of epochs")
    if finetune and request.train is None:
        raise InputError("fine-tuning needs training images; accepted: data")
    if resume is not None and not finetune:
        raise InputError("resume continues fine-tuning; accepted: the arguments of the interrupted call, as they were")
    training = {"epochs": finetune, "seed": seed, "distillation": asdict(distillation)}
    job = _Job(request, training, sensitivity)
    resume = copy.deepcopy(resume)  # training on would change its tensors
    final = final_stage(request.train, finetune)
    after: Any = job.run(final) if resume is None else job.resumed(resume)
    report = job.report
    if finetune:
        job.finetune(after, distillation, resume, after_epoch)
    if execution == "auto" and budget.kind != "macs":
        choose_executions(after, report.layers, request.size)
    if saved is not None:
        after = saved(after)
    score(report, final, after, validation, test)
    report.measure(request.before, after, request.size, seed)
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


class _Job:
    """One conversion on its way through the stages: its report, and what the fine-tuning is to be."""

    def __init__(self, request: Request, training: dict[str, Any], sensitivity: dict[str, Any] | None) -> None:
        self.request, self.training = request, training
        self.report = ConversionReport(request.to_dict(), [], sensitivity=sensitivity)

    def run(self, final: str) -> nn.Module:
        """Plan and build; with data re-estimate batch norm; score the stages before the final one."""
        request, report = self.request, self.report
        planner = Planner(request, report)
        score(report, "before", request.before, request.validation, request.test)
        if request.test is None and request.validation is None:
            report.notes.append("accuracy was not measured: no test images were given (--data)")
        plan, built = planner.built()
        after, report.refinement_steps = built.network, built.refinement_steps
        for name, layer in request.layers.items():
            option = plan[name].option
            form, rank = (option.form, option.rank) if option else (None, None)
            shape, curves, error = tuple(layer.weight.shape), planner.curves[name], built.errors.get(name)
            row = LayerReport(name, layer.group.name, shape, curves, form, rank, plan[name].why, fit_error=error)
            report.layers.append(row)
        converted = any(row.form is not None for row in report.layers)
        if not converted:
            separable = all(isinstance(layer, SeparableGConv2d) for layer in request.layers.values())
            what = "separable already and stay as given" if separable else "as given"
            report.notes.append(f"nothing was converted, the layers are {what}; accepted: a lower budget, or one form")
        report.measure_output(request.before, after, request.size, request.seed)
        if final != "converted":
            score(report, "converted", after, request.validation, request.test)
        if request.train is None:
            report.notes.append("batch norm was not re-estimated: no training images were given (--data)")
        else:
            if converted:  # else the network stays as it is, to the bit
                reestimate_batchnorm(after, request.train.images)
            if final != "batch_norm":
                score(report, "batch_norm", after, request.validation, request.test)
        return after

    def resumed(self, state: dict[str, Any]) -> nn.Module:
        """The network that an interrupted fine-tuning had, and its report.

        Raises:
            InputError: it is not the state of a conversion with these arguments.
        """
        after = copy.deepcopy(self.request.before)
        try:
            if state["original"] != fingerprint(self.request.before) or state["request"] != self.request.to_dict():
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
        distillation: Distillation,
        resume: dict[str, Any] | None,
        after_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        """Fine-tune in place; after every epoch the state goes out."""
        assert self.request.train is not None
        history: list[dict[str, Any]] = [] if resume is None else list(resume["history"])
        fixed = {
            "original": fingerprint(self.request.before),
            "request": self.request.to_dict(),
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
            self.request.before,
            converted,
            self.request.train,
            epochs=self.training["epochs"],
            seed=self.request.seed,
            distillation=distillation,
            resume=None if resume is None else resume["fit"],
            after_epoch=keep,
        )
        self.report.finetuning = {**recipe, "history": history}
        after.eval()
