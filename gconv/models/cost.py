"""Parameters and multiply-accumulates of a network, per layer, in the published convention and as executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gconv.functional.forms import check_execution
from gconv.nn.base import GroupConvBase
from gconv.nn.modes import evaluating
from gconv.system.errors import InputError


@dataclass(frozen=True)
class LayerCost:
    """One layer's row, for one image (:func:`cost`).

    Attributes:
        name: its name in the network.
        kind: its class.
        parameters: its learnable entries.
        macs_published: multiply-accumulates in the published convention.
        macs_executed: as executed.
        positions: H W of its input map and of its output map (of the last pass, if it runs several times).
    """

    name: str
    kind: str
    parameters: int
    macs_published: int
    macs_executed: int
    positions: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """A network's cost for one image: the rows of its layers (in the order they run) and, as properties, the totals."""

    layers: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """All learnable entries, batch norm and head included."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs_published(self) -> int:
        """Multiply-accumulates in the published convention."""
        return sum(layer.macs_published for layer in self.layers)

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates as executed."""
        return sum(layer.macs_executed for layer in self.layers)


def cost(model: nn.Module, input_shape: Sequence[int], *, execution: str | None = None) -> Cost:
    """Count parameters, and the multiply-accumulates (MACs) of one forward pass on one image.

    A MAC is one multiplication and one addition (so 2 FLOPs) inside a convolution. Convolutions alone are counted, as
    in the published tables: not biases, batch norm, activations, pooling, nor the linear head. Zeros of the padding
    count as if they were data. Two conventions:

    - *published*: every separable layer is charged for its two factors, both at the layer's output resolution. This
      is optimistic where the group mix runs first, on the larger input map of an unpadded or strided layer.
    - *as executed*: what runs. A factorised layer is charged for the mix at the resolution where it runs; a layer
      that runs dense, and every full layer, is charged for the dense convolution, also where the compiled kernel runs
      it with fewer (:class:`gconv.GConv2d`). Building filters (independent of the image) is not counted.

    Args:
        model: any module; its ``nn.Conv2d`` and group-convolution layers are counted.
        input_shape: shape of one input without the batch, e.g. ``(1, 28, 28)``.
        execution: count as if all separable layers ran this way (``"factorized"``: mix first, as in the published
            code, ``"dense"``); by default each layer's own.

    Raises:
        InputError: unknown execution, or the model does not take that input.
    """
    if execution is not None:
        check_execution(execution)
    seen: dict[nn.Module, LayerCost] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        into, out = (map_.shape[-2:].numel() if map_.dim() > 3 else 1 for map_ in (inputs[0], output))
        published = executed = 0
        if isinstance(module, nn.Conv2d):
            published = executed = out * module.weight.numel()
        elif isinstance(module, GroupConvBase):
            at_input, at_output = module.macs(execution)
            executed = into * at_input + out * at_output
            published = out * sum(module.macs("factorized"))
        if module in seen:  # a layer that runs several times has its parameters once
            published, executed = published + seen[module].macs_published, executed + seen[module].macs_executed
        seen[module] = LayerCost(names[module], type(module).__name__, parameters, published, executed, (into, out))

    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(record) for module in owners]
    like = next(model.parameters(), torch.empty(0))
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
    except (InputError, RuntimeError) as error:
        raise InputError(f"the network does not take an input of shape {list(input_shape)}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(tuple(seen.values()))
