"""Parameters and multiply-accumulates of a network, per layer, in the published convention and as executed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gconv.functional.forms import check_execution
from gconv.kernels.dispatch import variants_with
from gconv.nn.base import GroupConvBase
from gconv.nn.capture import Call, watch_calls
from gconv.nn.execution import kernel_for
from gconv.nn.modes import evaluating
from gconv.system.errors import InputError


@dataclass(frozen=True)
class LayerCost:
    """One layer's row, for one image (:func:`cost`).

    Attributes:
        name: its name in the network; empty for the network itself.
        kind: its class.
        parameters: its learnable entries, without those that an earlier row has.
        macs_published: multiply-accumulates in the published convention.
        macs_executed: multiply-accumulates as executed.
        positions: H W of its input map and of its output map, 1 if there is no map. The sum over all its runs, if it
            runs several times; (0, 0) if it does not run.
    """

    name: str
    kind: str
    parameters: int
    macs_published: int
    macs_executed: int
    positions: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """A network's cost for one image: the rows of its layers, and as properties the totals.

    Attributes:
        layers: one row for each module that has parameters of its own or calls a convolution, in the order in which
            they run; then those that did not run.
        notes: what the rows do not tell: parameters that several layers share, and layers that did not run.
        kernel: the class of machines that ``macs_executed`` holds for: the instruction set of the compiled kernel
            (``any``, ``avx2`` or ``avx512``), or ``none`` where PyTorch's operations run all layers.
    """

    layers: tuple[LayerCost, ...]
    notes: tuple[str, ...] = ()
    kernel: str = "none"

    @property
    def parameters(self) -> int:
        """All learnable entries, batch norm and head included, each once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs_published(self) -> int:
        """Multiply-accumulates in the published convention."""
        return sum(layer.macs_published for layer in self.layers)

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates as executed."""
        return sum(layer.macs_executed for layer in self.layers)


def cost(
    model: nn.Module, input_shape: Sequence[int], *, execution: str | None = None, kernel: str | None = None
) -> Cost:
    """Count parameters, and the multiply-accumulates (MACs) of one forward pass on one image.

    A MAC is one multiplication and one addition (so 2 FLOPs) inside a convolution. Convolutions alone are counted, as
    in the published tables: not biases, batch norm, activations, pooling, nor the linear head. Zeros of the padding
    count as if they were data.

    Every convolution is counted that PyTorch is asked for, of one, two or three dimensions, by a layer or by a function
    in a module's ``forward``; it is in the row of the innermost module that runs. It costs the size of its filter for
    each position of its output, or of its input if it is transposed.

    There are two conventions for this package's layers:

    - *published*: every separable layer is charged for its two factors, both at the layer's output resolution. This
      is optimistic where the group 1x1 convolution runs first, on the larger input map of an unpadded or strided layer.
    - *as executed*: what runs. A factorised layer is charged for the group 1x1 convolution at the resolution where it
      runs. In which basis it mixes may depend on the machine (:attr:`gconv.SeparableGConv2d.resolved_execution`). A
      layer that runs dense, and every full layer, is charged for the dense convolution, also where the compiled kernel
      runs it with fewer MACs (:class:`gconv.GConv2d`). Building filters does not depend on the image, and is not
      counted.

    Args:
        model: any module that takes one tensor. A compiled one is run eagerly.
        input_shape: shape of one input without the batch, e.g. ``(1, 28, 28)``.
        execution: count as if all separable layers ran this way (``"factorized"``: the group 1x1 convolution first, as
            in the published code; ``"dense"``); by default each layer's own.
        kernel: count as on a machine of this class, where layers with the execution ``auto`` run as is fastest there:
            ``"none"`` (no compiled kernel), ``"any"``, ``"avx2"`` or ``"avx512"``. By default as on this machine.

    Raises:
        InputError: unknown execution or kernel, or the model does not take that input.
    """
    if kernel is not None:
        variants_with(kernel)  # checks the name
    if execution is not None:
        check_execution(execution)
        for layer in model.modules():
            if isinstance(layer, GroupConvBase):
                layer.macs(execution)  # a form may not have it
    model = getattr(model, "_orig_mod", model)  # the network in a compiled one
    like = next(model.parameters(), torch.empty(0))
    counter = _Counter(execution, kernel)
    watched = watch_calls(model.modules(), before=counter.enter, after=counter.leave)
    try:
        with evaluating(model), torch.no_grad(), watched, counter:
            model(torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
    except (InputError, RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"the network does not take an input of shape {list(input_shape)}: {what}") from error
    return _with_parameters(model, counter.ran, kernel_for(like) if kernel is None else kernel)


@dataclass
class _Run:
    """What one module has cost so far."""

    published: int = 0
    executed: int = 0
    into: int = 0
    out: int = 0

    def add(self, published: int, executed: int) -> None:
        self.published += published
        self.executed += executed


class _Counter(TorchDispatchMode):
    """Counts, during one pass, for the module that is running.

    Attributes:
        ran: the modules in the order in which they finished for the first time.
    """

    def __init__(self, execution: str | None, kernel: str | None) -> None:
        super().__init__()
        self.ran: dict[nn.Module, _Run] = {}
        self._execution, self._kernel = execution, kernel
        self._running: list[tuple[nn.Module, _Run]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would load its compiler, which takes longer than the pass

    def enter(self, call: Call) -> None:
        self._running.append((call.layer, _Run()))

    def leave(self, call: Call) -> None:
        layer, this = self._running.pop()
        if not (this.into or this.out):
            this.into, this.out = _positions(call.input), _positions(_first_tensor(call.output))
        if isinstance(layer, GroupConvBase):
            at_input, at_output = layer.macs(self._execution, self._kernel)
            this.add(this.out * sum(layer.macs("factorized")), this.into * at_input + this.out * at_output)
        total = self.ran.setdefault(layer, _Run())
        total.add(this.published, this.executed)
        total.into += this.into
        total.out += this.out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        ours = any(isinstance(layer, GroupConvBase) for layer, _ in self._running)  # counted by their own formulas
        if func is torch.ops.aten.convolution.default and not ours:
            x, filter, transposed = args[0], args[1], args[6]
            into, out = (len(maps) * math.prod(maps.shape[2:]) for maps in (x, result))
            macs = filter.numel() * (into if transposed else out)
            _, this = self._running[-1]
            this.add(macs, macs)
            this.into += into
            this.out += out
        return result


def _positions(maps: Tensor | None) -> int:
    return len(maps) * maps.shape[-2:].numel() if maps is not None and maps.dim() > 3 else 1


def _first_tensor(output: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


def _with_parameters(model: nn.Module, ran: dict[nn.Module, _Run], kernel: str) -> Cost:
    """The rows of what ran, and of what has parameters but did not run."""
    names = {module: name for name, module in model.named_modules()}
    owned: dict[nn.Parameter, str] = {}  # the name under which a parameter was counted
    rows, notes = [], []
    for module in dict.fromkeys([*ran, *names]):
        name, kind = names[module], type(module).__name__
        new = 0
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{name}.{own}".lstrip(".")
            if parameter in owned:
                notes.append(f"{full} is {owned[parameter]}, and is counted there")
            else:
                owned[parameter] = full
                new += parameter.numel()
        run = ran.get(module)
        if run is None and new:
            notes.append(f"{name or 'the network'} ({kind}) was not called; its parameters are counted")
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if has_parameters or (run is not None and run.executed):
            run = run or _Run()
            rows.append(LayerCost(name, kind, new, run.published, run.executed, (run.into, run.out)))
    return Cost(tuple(rows), tuple(notes), kernel)
