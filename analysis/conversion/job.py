"""One conversion on its way through its stages: planned, built, batch norm re-estimated, fine-tuned."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from analysis.allocation.sensitivity import fingerprint
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.fitting.distillation import finetune
from gconv.models.checkpoint import apply_choices, layer_choices
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.training.evaluation import evaluate

from .builder import Built, Plan
from .finetuning import Finetuning
from .layers import group_layers, keep_frozen
from .planner import Planner
from .report import ConversionReport, LayerReport
from .request import Request
from .splits import Splits


def final_stage(splits: Splits, epochs: int) -> str:
    """The last of the stages that a conversion goes through."""
    return "finetuned" if epochs else "converted" if splits.train is None else "batch_norm"


def score(report: ConversionReport, stage: str, network: nn.Module, splits: Splits) -> None:
    """Enter the network's error on validation and test images into the report, under the name of a stage."""
    if splits.validation is not None:
        own = report.accuracy.setdefault("validation", {"images": len(splits.validation.labels)})
        own[stage] = evaluate(network, splits.validation, label=f"validating ({stage})").error
    if splits.test is not None:
        report.accuracy["test_images"] = len(splits.test.labels)
        report.accuracy[stage] = evaluate(network, splits.test, label=f"testing ({stage})").error


class Job:
    """One conversion, its fine-tuning included.

    Attributes:
        request: the conversion.
        training: the fine-tuning after it.
        report: what was done; filled in on the way.
    """

    def __init__(self, request: Request, training: Finetuning, sensitivity: dict[str, Any] | None = None) -> None:
        if training.epochs and request.splits.train is None:
            raise InputError("fine-tuning needs training images. Give them as data.")
        self.request, self.training = request, training
        self.report = ConversionReport(request.to_dict(), [], sensitivity=sensitivity)

    def run(self) -> nn.Module:
        """The network after its last stage; the stages before the last one are scored.

        Raises:
            InputError: the budget cannot be met, or the state to resume is not that of this conversion.
        """
        # Training on would change the tensors of the state.
        state = copy.deepcopy(self.training.resume)
        after = self._converted() if state is None else self._resumed(state)
        if self.training.epochs:
            self._finetune(after, state)
        return after

    def _converted(self) -> nn.Module:
        """Plan and build; re-estimate batch norm if there are training images."""
        request, report = self.request, self.report
        final = final_stage(request.splits, self.training.epochs)
        planner = Planner(request, report)
        score(report, "before", request.before, request.splits)
        if request.splits.test is None and request.splits.validation is None:
            report.notes.append("accuracy was not measured: no test images were given (--data)")
        plan, built = planner.built()
        after = built.network
        self._enter_layers(plan, built, planner.curves)
        report.measure_output(request.before, after, request.size, request.seed)
        if final != "converted":
            score(report, "converted", after, request.splits)
        if request.splits.train is None:
            report.notes.append("batch norm was not re-estimated: no training images were given (--data)")
            return after
        if any(row.form is not None for row in report.layers):  # else the network stays as it is, to the bit
            reestimate_batchnorm(after, request.splits.train.images)
        if final != "batch_norm":
            score(report, "batch_norm", after, request.splits)
        return after

    def _enter_layers(self, plan: Plan, built: Built, curves: dict[str, dict[str, list[float]]]) -> None:
        """Enter what each layer became into the report."""
        report = self.report
        report.refinement_steps = built.refinement_steps
        for name, layer in self.request.layers.items():
            option = plan[name].option
            form, rank = (option.form, option.rank) if option else (None, None)
            shape, error = tuple(layer.weight.shape), built.errors.get(name)
            row = LayerReport(name, layer.group.name, shape, curves[name], form, rank, plan[name].why, fit_error=error)
            report.layers.append(row)
        if all(row.form is None for row in report.layers):
            separable = all(isinstance(layer, SeparableGConv2d) for layer in self.request.layers.values())
            what = "separable already and stay as given" if separable else "as given"
            report.notes.append(f"nothing was converted, the layers are {what}. Try a lower budget, or one form.")

    def _resumed(self, state: dict[str, Any]) -> nn.Module:
        """The network of an interrupted fine-tuning; its report takes the place of this one.

        Raises:
            InputError: it is not the state of a conversion with these arguments.
        """
        before = self.request.before
        after = copy.deepcopy(before)
        try:
            if state["original"] != fingerprint(before) or state["request"] != self.request.to_dict():
                raise InputError("the interrupted fine-tuning was of another network or another budget")
            if state["training"] != self.training.to_dict(self.request.seed):
                raise InputError("the interrupted fine-tuning had other epochs, another seed or another loss")
            apply_choices(after, state["layers"])
            for name, layer in group_layers(after).items():
                keep_frozen(group_layers(before)[name], layer)
            after.load_state_dict(state["state_dict"])
            self.report = ConversionReport.from_dict(state["report"])
            if len(state["history"]) != state["fit"]["epochs_done"]:
                raise InputError("the state of the interrupted fine-tuning is inconsistent: an epoch is missing")
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"the state of the interrupted fine-tuning is inconsistent: {error}") from error
        return after.eval()

    def _finetune(self, after: nn.Module, state: dict[str, Any] | None) -> None:
        """Fine-tune in place; after every epoch its state is handed to ``training.after_epoch``."""
        request, training = self.request, self.training
        assert request.splits.train is not None
        history: list[dict[str, Any]] = [] if state is None else list(state["history"])
        fixed = {
            "original": fingerprint(request.before),
            "request": request.to_dict(),
            "training": training.to_dict(request.seed),
            "layers": layer_choices(after),
        }

        def keep(row: dict[str, Any], fit_state: dict[str, Any]) -> None:
            history.append(row)
            now = {"report": self.report.to_dict(), "state_dict": after.state_dict(), "fit": fit_state}
            training.after_epoch(copy.deepcopy({**fixed, **now, "history": history}))  # the next epoch changes tensors

        converted = [row.name for row in self.report.layers if row.form is not None]
        recipe = finetune(
            after,
            request.before,
            converted,
            request.splits.train,
            epochs=training.epochs,
            seed=request.seed,
            distillation=training.distillation,
            resume=None if state is None else state["fit"],
            after_epoch=keep,
        )
        self.report.finetuning = {**recipe, "history": history}
        after.eval()
