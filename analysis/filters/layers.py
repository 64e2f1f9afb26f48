"""The layers of a network or of a state dict that hold convolution filters, before their group is settled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gconv.functional.expansion import Tables
from gconv.functional.form_base import FilterShape, Form
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import Group
from gconv.interop.readers import UNKNOWN, LayerKind, StateDict, is_steerable, read_steerable
from gconv.interop.recognition import TOLERANCE, Fit
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.separable_conv import SeparableGConv2d

_OTHER_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_READ = "only Conv2d layers and group convolutions are read"
# What the name of a layer, or of its class, says about the kind of convolution.
_TRANSPOSED = re.compile("transpose|deconv", re.IGNORECASE)
_THREE_DIMENSIONAL = re.compile("3d", re.IGNORECASE)


@dataclass(frozen=True)
class Skipped:
    """A layer with weights like those of a convolution that gives no filter bank.

    Attributes:
        name: the name of the layer in the network, or of the tensor in a state dict.
        reason: why it was left out.
    """

    name: str
    reason: str


def notes_of(skipped: Iterable[Skipped]) -> list[str]:
    """One sentence for each reason, with the names of the layers that were left out for it."""
    names: dict[str, list[str]] = {}
    for layer in skipped:
        names.setdefault(layer.reason, []).append(layer.name)
    return [f"skipped {', '.join(of_reason)}: {reason}" for reason, of_reason in names.items()]


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a separable layer as they are stored; the generator depends on the group, which may be unknown.

    Attributes:
        mix: the group mixing of the form, see :mod:`gconv.functional.forms`.
        spatial: the spatial kernels of the form.
        form: the separable form.
    """

    mix: Tensor
    spatial: Tensor
    form: Form

    @property
    def shape(self) -> FilterShape:
        """The shape of the generator."""
        return _generator_shape(self.form, self.mix, self.spatial)

    def generator(self, group: Group) -> Tensor:
        """``[O, I, S, k, k]``, computed in the precision in which the layer runs."""
        mix, spatial = (factor if factor.itemsize > 2 else factor.float() for factor in (self.mix, self.spatial))
        return self.form.generator(mix, spatial, self.shape, Tables.build(group, self.shape.k).pixels)


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """A convolution as it was found.

    Attributes:
        name: its name in the network.
        weight: float64 on the CPU; plain ``[O, I, k, k]``, or a generator ``[O, I, S_in, k, k]``. For a separable layer
            of a state dict, its factors.
        group: the group of a generator, if the layer knows it.
        order: the order of that group, if the layer knows only the order.
        residual: as in :class:`analysis.FilterBank`; so are ``form``, ``channel_groups`` and ``taken_back``.
        typed: whether the source says which kind of layer it is. A state dict of another library does not.
        problem: why it gives no filter bank. It still tells the order of the group.
    """

    name: str
    weight: Tensor | Factors
    group: Group | None = None
    order: int | None = None
    residual: float = 0.0
    form: str | None = None
    channel_groups: int = 1
    taken_back: bool = False
    typed: bool = True
    problem: str | None = None

    @property
    def has_group_axis(self) -> bool:
        """Whether it is a generator, that of a lifting layer included."""
        return isinstance(self.weight, Factors) or self.weight.dim() == 5

    @property
    def axis_size(self) -> int:
        """The size of a generator's group axis; 1 for a lifting layer."""
        return self.weight.shape.order if isinstance(self.weight, Factors) else self.weight.shape[2]

    def generator(self, group: Group) -> Tensor:
        """``[O, I, S_in, k, k]`` under this group, float64 on the CPU; S_in is 1 for plain weights."""
        if isinstance(self.weight, Factors):
            return self.weight.generator(group).double()
        return self.weight if self.weight.dim() == 5 else self.weight.unsqueeze(2)


def layers_of_network(network: nn.Module) -> Iterator[FoundLayer | Skipped]:
    """The convolutions of a network, in its order."""
    for name, module in network.named_modules():
        name, kind = name or type(module).__name__, type(module).__name__  # the network may itself be a layer
        if isinstance(module, (LiftingConv2d, GConv2d, SeparableGConv2d)):
            form = module.form.name if isinstance(module, SeparableGConv2d) else None
            yield _usable(name, module.weight, group=module.group, form=form)
        elif is_steerable(module):
            found = read_steerable(module)
            yield Skipped(name, found) if isinstance(found, str) else _from_escnn(name, *found)
        elif isinstance(module, nn.Conv2d):
            yield _usable(name, module.weight, channel_groups=module.groups)
        elif isinstance(module, _OTHER_CONVOLUTIONS):
            yield Skipped(name, f"it is a {kind}; {_READ}")
        elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() in (4, 5):
            if weight.dim() == 4 or _TRANSPOSED.search(kind) or _THREE_DIMENSIONAL.search(kind):
                yield Skipped(name, f"it is a {kind} with a {weight.dim()}-dimensional weight; {_READ}")
            else:
                yield _usable(name, weight, order=getattr(module, "output_stabilizer_size", None))  # as in GrouPy


def layers_of_state(state: StateDict) -> Iterator[FoundLayer | Skipped]:
    """The convolutions of a state dict, in its order, as far as names and shapes tell."""
    for key, tensor in state.items():
        prefix, leaf = key[: key.rfind(".") + 1], key.rpartition(".")[2]
        name = prefix.removesuffix(".") or key
        known = state.layers.get(prefix.removesuffix("."), UNKNOWN)
        if leaf in ("mix", "spatial") and {prefix + "mix", prefix + "spatial"} <= state.keys():
            if leaf == "mix":
                yield _from_factors(name, tensor, state[prefix + "spatial"], state.get(prefix + "bias"), known)
        elif leaf in ("weight", "filter") and tensor.dim() in (4, 5):
            yield _from_tensor(name, tensor, state.get(prefix + "bias"), known)
        elif leaf == "weights" and tensor.dim() == 1 and prefix + "filter" not in state:
            yield Skipped(name, "it holds escnn's coefficients; the state dict has its filter only after eval()")
        elif leaf == "weight" and tensor.dim() == 3:
            yield Skipped(name, "its weight has 3 dimensions, like that of a 1-D convolution")
        elif tensor.dim() in (4, 5) and leaf != "sampled_basis":  # escnn's basis, which its coefficients multiply
            yield Skipped(key, f"it has {tensor.dim()} dimensions, but only tensors called weight or filter are read")


def _from_tensor(name: str, weight: Tensor, bias: Tensor | None, known: LayerKind) -> FoundLayer | Skipped:
    """A layer of a state dict with its whole weight."""
    if known.group is not None:
        return _usable(name, weight, group=known.group)
    if _TRANSPOSED.search(name):
        return Skipped(name, "its name is that of a transposed convolution")
    if bias is not None and bias.dim() == 1 and len(bias) != len(weight):
        sizes = f"its bias has {len(bias)} entries and its weight {list(weight.shape)}"
        return Skipped(name, f"{sizes}: the output channels are not on the first axis, as in a transposed convolution")
    if weight.dim() == 5 and _THREE_DIMENSIONAL.search(name):
        return Skipped(name, "its name is that of a 3-D convolution")
    return _usable(name, weight, typed=False)


def _from_factors(
    name: str, mix: Tensor, spatial: Tensor, bias: Tensor | None, known: LayerKind
) -> FoundLayer | Skipped:
    """A separable layer of a state dict: of the form that the state dict names, else of the only one that fits."""
    forms = [form for form in FORMS.values() if _fits(form, mix, spatial, bias)]
    if known.form is not None:
        forms = [form for form in forms if form is known.form]
    elif 1 in (mix.shape[-1], spatial.shape[-1]):  # then g_turned is g and gc_turned is gc: nothing is transformed
        forms = [form for form in forms if form.name not in ("g_turned", "gc_turned")]
    shapes = f"{list(mix.shape)} and {list(spatial.shape)}"
    if not forms:
        wanted = "any separable form" if known.form is None else f"the form {known.form.name}"
        return Skipped(name, f"its tensors mix and spatial, {shapes}, do not have the shapes of {wanted}")
    if problem := _problem(mix) or _problem(spatial):
        return Skipped(name, problem)
    if len(forms) > 1:
        problem = (
            f"its factors, {shapes}, fit the forms {', '.join(form.name for form in forms)}, and the state dict does "
            "not say which; give the network, or a file written by gconv.save"
        )
    form = forms[0]
    return FoundLayer(name, Factors(mix.cpu(), spatial.cpu(), form), known.group, form=form.name, problem=problem)


def _fits(form: Form, mix: Tensor, spatial: Tensor, bias: Tensor | None) -> bool:
    """Whether the tensors have the shapes of factors of this form."""
    leading = len(form.block_axes)
    if mix.dim() != 4 or spatial.dim() != leading + 3 or spatial.shape[-1] != spatial.shape[-2]:
        return False
    shape, rank = _generator_shape(form, mix, spatial), mix.shape[leading]
    return (
        form.factor_shapes(shape, rank) == (tuple(mix.shape), tuple(spatial.shape))
        and rank <= form.max_rank(shape)
        and (bias is None or tuple(bias.shape) == (shape.out_channels,))
    )


def _generator_shape(form: Form, mix: Tensor, spatial: Tensor) -> FilterShape:
    """The shape of the generator, if the factors are of this form."""
    axes = form.block_axes + "r" + "oi".translate({ord(axis): None for axis in form.block_axes}) + "s"
    sizes = dict(zip(axes, mix.shape, strict=True))
    return FilterShape(sizes["o"], sizes["i"], sizes["s"], spatial.shape[-1])


def _from_escnn(name: str, group: Group, fit: Fit) -> FoundLayer | Skipped:
    if fit.residual > TOLERANCE:
        return Skipped(name, f"its rows do not share one generator: relative residual {fit.residual:.2g}")
    return FoundLayer(name, fit.generator, group, residual=fit.residual, taken_back=True)


def _usable(name: str, weight: Tensor, **about: Any) -> FoundLayer | Skipped:
    """The layer with its weight in float64 on the CPU, if the weight holds square filters of real numbers."""
    if problem := _problem(weight):
        return Skipped(name, problem)
    *_, rows, columns = weight.shape
    if rows != columns:
        return Skipped(name, f"its kernels are {rows}x{columns}; only square kernels are read")
    return FoundLayer(name, weight.detach().to(device="cpu", dtype=torch.float64), **about)


def _problem(weight: Tensor) -> str | None:
    """Why a tensor cannot be read as a weight; None if it can."""
    if is_lazy(weight) or weight.is_meta:
        return "its weights do not exist yet: the layer is lazy or on the meta device"
    if (
        not weight.is_floating_point() or weight.itemsize == 1
    ):  # 8-bit weights are quantised; their scales are elsewhere
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weights are {dtype}; accepted: float16, bfloat16, float32, float64"
    return None if weight.numel() else "its weight has no entries"
