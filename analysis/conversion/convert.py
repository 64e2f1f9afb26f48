"""Convert a trained network into the best separable one within a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Never, TypeVar

from torch import Tensor, nn

from analysis.allocation.budget import Budget
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.training.datasets import Split

from .autotune import choose_executions
from .finetuning import Finetuning
from .job import Job, final_stage, score
from .layers import group_layers, replace_layer, sharing
from .report import ConversionReport
from .request import Request
from .splits import Splits

Network = TypeVar("Network", bound=nn.Module)

_MOVED = ("distillation", "after_epoch", "resume")  # arguments of convert once, attributes of Finetuning now


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
    finetune: int | Finetuning = 0,
    sensitivity: Any = None,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
    saved: Callable[[Network], Network] | None = None,
    **moved: Never,
) -> tuple[Network, ConversionReport]:
    """Replace a network's group-to-group layers by separable ones within a budget; fine-tune if asked.

    With ``data`` every layer is fitted to the *output* that it had in the original network, from the input that the
    converted layers before it give (:mod:`analysis.fitting.alternating`). Then it is refined together with the batch
    norm behind it (:mod:`analysis.fitting.reconstruction`). Without ``data`` every layer is fitted to its filter, by a
    truncated SVD. The network stays equivariant under any budget. Lifting layers, 1x1 layers and layers that share a
    parameter with another one are left as they are. A frozen layer (``requires_grad=False``) stays frozen.

    Give at most one budget, of ``rank`` to ``max_drop``. Without one, every layer keeps 95 % of its energy.

    Args:
        model: a trained network with layers of this package. It is not changed.
        form: of every layer, one of ``gconv.FORMS``; or ``auto``, the best form for each layer.
        rank: the rank of every layer (or the layer's largest rank, if that is smaller).
        energy: the share of its energy that every layer keeps, at the smallest rank that does.
        params: parameters of the whole network: a fraction up to 1, or a number.
        macs: multiply-accumulates of one image as executed: a fraction up to 1, or a number.
        latency: of a batch of 16 on this machine: a fraction up to 1, or a time such as ``"3.5ms"``. It is measured in
            a new process that only loads the networks.
        max_drop: points of accuracy that may be lost on ``validation`` before fine-tuning. The range of parameters is
            halved again and again; of the networks tried that lose no more, the smallest one is taken.
        allocation: how params, macs or latency are shared out over the layers: ``auto`` or one of
            ``analysis.ALLOCATORS``.
        minimise: ``outputs`` (needs data), ``weights``, or ``auto``: outputs if there is data.
        execution: ``dense``, ``factorized`` or ``irrep`` for every layer. ``auto`` takes what is measured to be
            fastest, except under ``macs``, where every layer runs as its MACs were counted.
        data: training images with labels, a :class:`gconv.Split` or a loader of batches. Layers are fitted on them,
            batch norm is re-estimated on them, and fine-tuning learns from them.
        validation: images that the network was not trained on. If given, options are compared on them.
        test: images on which the error is reported at every stage. Nothing is chosen by them.
        finetune: epochs of training after the conversion, with the original network as teacher; needs ``data``. An
            :class:`analysis.Finetuning` also sets the loss, and can continue an interrupted training.
        sensitivity: ``report.sensitivity`` of an earlier conversion of this network, which is not measured again.
        seed: of the choice of images, the order of images in fine-tuning, and the random images in the report.
        input_shape: the shape of one image, ``(C, H, W)``. The default is the model's own, or that of ``data``.
        saved: saves the network and returns it as loaded back, so that the report is about the file.
        moved: no other argument exists. Those of earlier versions get an error that says where they are now.

    Returns:
        The new network in eval mode, and the report.

    Raises:
        InputError: there are several budgets, or the budget cannot be met (the error names the nearest that can); a
            value is out of range or a name is unknown; the network has no layer to convert or has weights that are not
            finite; or images are missing or do not fit the network.
    """
    if moved:
        raise _unknown(moved)
    budget = Budget.of(rank=rank, energy=energy, params=params, macs=macs, latency=latency, max_drop=max_drop)
    training = Finetuning.of(finetune)
    request = Request.checked(
        model, form, budget, Splits.of(data, validation, test),
        allocation=allocation, minimise=minimise, execution=execution,
        sensitivity=sensitivity, seed=seed, input_shape=input_shape,
    )  # fmt: skip
    job = Job(request, training, sensitivity)
    after: Any = job.run()
    report = job.report
    if execution == "auto" and budget.kind != "macs":
        choose_executions(request.before, after, report.layers, request.size)
    if saved is not None:
        after = saved(after)
    score(report, final_stage(request.splits, training.epochs), after, request.splits)
    report.measure(request.before, after, request.size, seed)
    return after, report


def _unknown(names: dict[str, Never]) -> Exception:
    """The error for keywords that :func:`convert` does not have."""
    for name in names:
        if name in _MOVED:
            return InputError(f"convert has no argument {name}. Give finetune=analysis.Finetuning(epochs, {name}=…).")
    return TypeError(f"convert() got an unexpected keyword argument {next(iter(names))!r}")


def to_dense(model: Network) -> Network:
    """A copy of the network in which every separable layer is folded back to a full one; same output to rounding.

    Raises:
        InputError: two separable layers share a factor, which full layers could not share.
    """
    dense = copy.deepcopy(model)
    shared = sharing(dense)
    for name, layer in group_layers(dense).items():
        if isinstance(layer, SeparableGConv2d):
            if name in shared:
                raise InputError(f"{name} cannot be folded back: {shared[name]}. Give each layer its own copy first.")
            replace_layer(dense, name, layer.to_dense())
    return dense
