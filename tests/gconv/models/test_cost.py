"""Costs: the published figures to the unit, a formula per layer, and PyTorch's own count of what ran."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from gconv.functional.form_base import FilterShape
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import group
from gconv.kernels.dispatch import KERNELS, variants
from gconv.kernels.library import kernel_class
from gconv.models.cost import LayerCost, cost
from gconv.models.networks import Model
from gconv.models.zoo import MODELS, create_model
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

# Parameters, MACs in the published convention, and as executed mix first; None where not published to the unit.
RECOUNTED = {
    "z2cnn": (25_210, 2_979_280, 2_979_280),
    "c-z2cnn": (25_603, None, None),
    "p4cnn": (24_810, 11_673_760, 11_673_760),
    "g-p4cnn-small": (8_910, None, None),
    "g-p4cnn": (25_255, 12_339_008, None),
    "gc-p4cnn-small": (3_420, None, None),
    "gc-p4cnn": (24_640, 13_006_560, None),
}
# The same in millions, with the published digits.
DIGITS = {
    "z2cnn": ("2.98", "2.98"),
    "c-z2cnn": ("4.12", "4.12"),
    "p4cnn": ("11.67", "11.67"),
    "g-p4cnn-small": ("4.37", "4.76"),
    "g-p4cnn": ("12.34", "13.46"),
    "gc-p4cnn-small": ("1.80", "2.19"),
    "gc-p4cnn": ("13.01", "16.51"),
}
CNN_SIZES = ((28, 26), (26, 24), (12, 10), (10, 8), (8, 6), (6, 4), (4, 1))  # maps in and out of the seven layers
EXECUTIONS = ("factorized", "dense", None)


def expected_macs(form: str, o: int, i: int, s: int, k: int, rank: int, into: int, out: int) -> tuple[int, int]:
    """Multiply-accumulates, (published, factorised), of a separable layer from side ``into`` to side ``out``."""
    if form == "g":  # every input map is mixed for every (output, input) pair, then filtered
        mix, spatial, mix_side = rank * o * i * s * s, rank * o * i * s * k * k, into
    elif form == "gc":  # all input maps are mixed into O S, which are filtered
        mix, spatial, mix_side = rank * o * s * i * s, rank * o * s * k * k, into
    elif form == "gc_in":  # the I S input maps are filtered, then mixed at the output's size
        mix, spatial, mix_side = rank * o * s * i * s, rank * i * s * k * k, out
    elif form == "g_turned":  # every input map is filtered for every output channel, then mixed at the output's size
        mix, spatial, mix_side = rank * o * s * i * s, rank * o * i * s * k * k, out
    else:  # the maps of each input element are mixed into O S, which are filtered
        mix, spatial, mix_side = rank * o * s * i * s, rank * o * s * s * k * k, into
    return (mix + spatial) * out**2, mix * mix_side**2 + spatial * out**2


def convolution_macs(model: nn.Module, *shape: int) -> int:
    """What PyTorch's counter sees of convolutions, and of products in place of 1x1 ones, in one forward pass.

    It counts 2 FLOPs a MAC. The linear head is left out, and so is what the first pass builds and keeps.
    """
    x = torch.zeros(1, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
        built = sum(counter.get_flop_counts()["Global"].values())
        model(x)
    flops = sum(counter.get_flop_counts()["Global"].values()) - built
    assert flops % 2 == 0
    return flops // 2 - model.fc.weight.numel()


def with_converted_layers() -> Model:
    """A p4cnn whose layers differ in form, rank and execution."""
    model = create_model("p4cnn", width=3)
    model.conv2 = SeparableGConv2d.from_dense(model.conv2, "g", 2, "factorized")
    model.conv3 = SeparableGConv2d.from_dense(model.conv3, "g", 2)
    model.conv4 = SeparableGConv2d.from_dense(model.conv4, "gc", 4)
    model.conv5 = SeparableGConv2d.from_dense(model.conv5, "gc", 3, "dense")
    model.conv6 = SeparableGConv2d.from_dense(model.conv6, "gc_in", 5)
    model.conv7 = SeparableGConv2d.from_dense(model.conv7, "gc_turned", 2)
    return model


# --- published figures


@pytest.mark.parametrize("name", RECOUNTED)
def test_recounted_figures_to_the_unit(name):
    # "Mix first" is how the published g layers run; ours run dense by default, so that column needs execution=.
    mix_first = cost(create_model(name), (1, 28, 28), execution="factorized")
    found = (mix_first.parameters, mix_first.macs_published, mix_first.macs_executed)
    assert [figure for figure, known in zip(found, RECOUNTED[name], strict=True) if known] == [
        known for known in RECOUNTED[name] if known
    ]
    assert tuple(f"{macs / 1e6:.2f}" for macs in found[1:]) == DIGITS[name]


def test_resnet44_macs_are_the_published_digits():
    assert f"{cost(create_model('resnet44'), (3, 32, 32)).macs_published / 1e9:.2f}" == "0.39"


def test_by_default_g_networks_run_dense():
    whole, separable = (cost(create_model(name, width=10), (1, 28, 28)) for name in ("p4cnn", "g-p4cnn"))
    assert separable.macs_executed == whole.macs_executed == 11_673_760


ON_MACHINES = {  # millions of MACs as executed; with AVX2, 10 channels would leave too much of the vectors empty
    "gc-p4cnn": {"none": "16.51", "any": "8.18", "avx2": "8.18", "avx512": "8.18"},
    "gc-p4cnn-small": {"none": "2.19", "any": "1.48", "avx2": "2.19", "avx512": "1.48"},
    "g-p4cnn": dict.fromkeys(KERNELS, "33.45"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ON_MACHINES)
def test_macs_as_executed_name_the_class_of_machines_that_they_hold_for(name, kernel):
    """The published ones and the parameters are the same on all."""
    net = create_model(name)
    counted, here = cost(net, (1, 28, 28), kernel=kernel), cost(net, (1, 28, 28))
    assert (counted.kernel, f"{counted.macs_executed / 1e6:.2f}") == (kernel, ON_MACHINES[name][kernel])
    assert (counted.parameters, counted.macs_published) == (here.parameters, here.macs_published)
    assert here.kernel == kernel_class()
    assert here == cost(net, (1, 28, 28), kernel=here.kernel)
    exact = cost(net.double(), (1, 28, 28))  # the kernel is in single precision
    assert (exact.kernel, f"{exact.macs_executed / 1e6:.2f}") == ("none", ON_MACHINES[name]["none"])
    assert cost(net, (1, 28, 28), kernel=kernel).macs_executed == counted.macs_executed


def test_an_unknown_class_of_machines_is_refused():
    with pytest.raises(InputError, match=r"^unknown kernel 'gpu'; accepted: none, any, avx2, avx512$"):
        cost(create_model("p4cnn", width=2), (1, 28, 28), kernel="gpu")


# --- a formula for every layer


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["p2", "p4", "p4m"])
def test_each_layer_of_a_separable_cnn(on, form, execution):
    w, s = 3, group(on).order
    net = create_model("p4cnn", group=on, width=w, separable=form)
    rows = cost(net, (1, 28, 28), execution=execution, kernel="none").layers  # in kernels, irreps would be faster
    assert [row.name for row in rows] == [f"{kind}{i}" for i in range(1, 8) for kind in ("conv", "bn")] + ["fc"]
    lifting, *separable = rows[0:14:2]
    assert (lifting.kind, lifting.parameters) == ("LiftingConv2d", w * 9 + w)
    assert lifting.macs_published == lifting.macs_executed == w * s * 9 * 26**2
    for row, (into, out) in zip(separable, CNN_SIZES[1:], strict=True):
        k = 4 if row.name == "conv7" else 3
        entries = w * w * (s + k * k) if form in ("g", "g_turned") else w * w * s + w * k * k
        published, factorised = expected_macs(form, w, w, s, k, 1, into, out)
        dense = (execution or ("dense" if form in ("g", "g_turned") else "factorized")) == "dense"
        assert (row.kind, row.parameters) == ("SeparableGConv2d", entries + w)
        assert row.macs_published == published
        assert row.macs_executed == (w * s * w * s * k * k * out**2 if dense else factorised)
    assert all((row.parameters, row.macs_published, row.macs_executed) == (2 * w, 0, 0) for row in rows[1:14:2])
    assert (rows[-1].parameters, rows[-1].macs_published, rows[-1].macs_executed) == (w * 10 + 10, 0, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rank", "stride", "padding", "out"), [(1, 1, 0, 9), (2, 2, 1, 6), (4, 1, 2, 13)])
def test_a_layer_with_rank_stride_and_padding(form, rank, stride, padding, out):
    layer = SeparableGConv2d(
        5, 3, 3, stride, padding, bias=False, group="p4", form=form, rank=rank, execution="factorized"
    )
    (row,) = cost(layer, (5, 4, 11, 11)).layers
    assert (row.macs_published, row.macs_executed) == expected_macs(form, 3, 5, 4, 3, rank, 11, out)
    assert row.parameters == FORMS[form].parameters(FilterShape(3, 5, 4, 3), rank)


def test_full_and_lifting_layers():
    (full,) = cost(GConv2d(5, 3, 3, 2, 1, group="p4m"), (5, 8, 11, 11)).layers
    assert full.macs_published == full.macs_executed == (3 * 8) * (5 * 8) * 9 * 6**2
    assert full.parameters == 3 * 5 * 8 * 9 + 3
    (lifting,) = cost(LiftingConv2d(2, 3, 5, bias=False, group="p4m"), (2, 9, 9)).layers
    assert lifting.macs_published == lifting.macs_executed == (3 * 8) * 2 * 25 * 5**2
    assert lifting.parameters == 3 * 2 * 25


def test_the_totals_are_sums_and_count_every_parameter():
    model = with_converted_layers()
    counted = cost(model, (1, 28, 28))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.macs_published == sum(row.macs_published for row in counted.layers)
    assert counted.macs_executed == sum(row.macs_executed for row in counted.layers)


# --- PyTorch's own count


@pytest.mark.parametrize("name", MODELS)
def test_executed_macs_are_what_pytorch_counts(name):
    model = create_model(name, width=4)
    counted = cost(model, model.input_shape, kernel="none")
    assert counted.macs_executed == convolution_macs(model, *model.input_shape)


@pytest.mark.parametrize("execution", ["dense", "factorized"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["p4cnn", "p4m-resnet44"])
def test_executed_macs_of_either_execution_are_what_pytorch_counts(name, form, execution):
    model = create_model(name, width=3, separable=form)
    for layer in model.modules():
        if isinstance(layer, SeparableGConv2d):
            layer.execution = execution
    counted = cost(model, model.input_shape)
    assert counted.macs_executed == convolution_macs(model, *model.input_shape)
    assert cost(create_model(name, width=3, separable=form), model.input_shape, execution=execution) == counted


def test_executed_macs_of_converted_layers_are_what_pytorch_counts():
    model = with_converted_layers()
    assert cost(model, (1, 28, 28), kernel="none").macs_executed == convolution_macs(model, 1, 28, 28)


@pytest.mark.skipif(not variants(), reason="there was no C compiler")
@pytest.mark.parametrize("execution", ["factorized", "irrep"])
@pytest.mark.parametrize("form", ["gc", "gc_in"])
@pytest.mark.parametrize("on", ["z2", "p2", "p4", "p4m"])
def test_executed_macs_of_the_compiled_kernel_are_those_of_its_products(on, form, execution):
    layer = SeparableGConv2d(5, 3, 3, group=on, form=form, rank=2, execution=execution)
    kernel, s, filtered = layer._kernel(), layer.group.order, 5 if form == "gc_in" else 3
    mixed = int((kernel.table[:, 1].long() * kernel.table[:, 3]).sum())
    if execution == "irrep":  # and the changes of basis, of the maps of both terms
        mixed += s**2 * (2 * 5 + 3 if form == "gc_in" else 5 + 2 * 3)
    planar = 2 * s * filtered * 9
    assert layer.macs() == ((0, mixed + planar) if form == "gc_in" else (mixed, planar))


# --- manners


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28)])
def test_the_network_is_left_as_it_was(shape):
    model = create_model("p4cnn", width=2).train()
    model.bn3.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shape[0] == 1:
        cost(model, shape)
    else:
        with pytest.raises(InputError):
            cost(model, shape)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["z2cnn", "p4cnn", "gc-p4m-resnet44"])
@pytest.mark.parametrize("shape", [(2, 28, 28), (1, 5, 5), (28, 28), ()])
def test_a_wrong_input_shape_is_one_line(name, shape):
    with pytest.raises(InputError, match="does not take an input of shape") as caught:
        cost(create_model(name, width=2), shape)
    assert "\n" not in str(caught.value)


def test_an_unknown_execution_is_refused():
    with pytest.raises(InputError, match="unknown execution 'sparse'; accepted: auto, dense, factorized, irrep"):
        cost(create_model("p4cnn", width=2), (1, 28, 28), execution="sparse")


# --- what is counted is what is there


class Called(nn.Module):
    """A 3x3 convolution without padding from 2 to 4 channels, called in some way, beside what a network may have."""

    def __init__(self, how: str, **kwargs: Any) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(2, 4, 3, **kwargs)

    def forward(self, x: Tensor) -> Any:
        match self.how:
            case "by keyword":
                return self.conv(input=x)
            case "beside a module without arguments":
                return self.conv(x) + self.position()
            case "with a tuple as result":
                return self.conv(x), x
            case "by its function":
                return F.conv2d(x, self.conv.weight, self.conv.bias)
            case "with frames as the batch":
                return self.conv(torch.cat([x, x, x]))
        return self.conv(x)


class Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self) -> Tensor:
        return self.shift


def called(how: str) -> nn.Module:
    net = Called(how)
    match how:
        case "beside a module without arguments":
            net.position = Position()
        case "weight norm":
            parametrizations.weight_norm(net.conv)
        case "weight norm as it was":
            with warnings.catch_warnings(action="ignore"):
                nn.utils.weight_norm(net.conv)
        case "weight norm without bias":
            net = Called(how, bias=False)
            parametrizations.weight_norm(net.conv)
        case "compiled":
            return torch.compile(net, backend="eager")
        case "compiled in place":
            net.compile(backend="eager")
            net(torch.zeros(1, 2, 8, 8))
        case "compiled inside":
            net.conv = torch.compile(net.conv, backend="eager")
    return net


CALLS = {
    "plainly": 0,
    "by keyword": 0,
    "beside a module without arguments": 4,
    "with a tuple as result": 0,
    "by its function": 0,
    "with frames as the batch": 0,
    "weight norm": 4,  # a norm for each filter
    "weight norm as it was": 4,
    "weight norm without bias": 0,  # four norms more and four biases less
    "compiled": 0,
    "compiled in place": 0,
    "compiled inside": 0,
}


@pytest.mark.parametrize("how", CALLS)
def test_a_convolution_is_counted_however_it_is_called(how: str) -> None:
    counted = cost(called(how), (2, 8, 8))
    images = 3 if how == "with frames as the batch" else 1
    assert counted.macs_executed == counted.macs_published == images * 6 * 6 * (4 * 2 * 9)
    assert counted.parameters == 4 * 2 * 9 + 4 + CALLS[how]
    (row,) = (row for row in counted.layers if row.macs_executed)
    assert row.positions == (images * 8 * 8, images * 6 * 6)
    assert row.name == {"by its function": "", "compiled inside": "conv._orig_mod"}.get(how, "conv")


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_any_dimension_transposed_or_not(dimensions: int, groups: int, transposed: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dimensions}d")
    layer = kind(4, 6, 3, stride=2, padding=1, groups=groups)
    counted = cost(layer, (4, *[9] * dimensions))
    filter = (4 // groups) * 6 * 3**dimensions
    # A transposed convolution multiplies every pixel that it reads by the filter, an ordinary one every one it writes.
    out = 17 if transposed else 5
    assert counted.macs_executed == counted.macs_published == filter * (9 if transposed else out) ** dimensions
    assert counted.parameters == filter + 6
    assert counted.layers[0].positions == (9**dimensions, out**dimensions)
    assert counted.notes == ()


@pytest.mark.parametrize("kind", ["planar", "full", "gc"])
def test_a_layer_that_runs_twice_is_counted_twice_and_its_parameters_once(kind: str) -> None:
    conv = conv_of(kind)
    net = nn.Sequential(conv, conv)  # under two names
    shape = (2, 8, 8) if kind == "planar" else (2, 4, 8, 8)
    once, twice = cost(conv, shape), cost(net, shape)
    assert twice.macs_executed == 2 * once.macs_executed > 0
    assert twice.macs_published == 2 * once.macs_published
    assert twice.parameters == once.parameters == sum(p.numel() for p in net.parameters())
    (row,) = twice.layers
    assert row.positions == (2 * 64, 2 * 64)


def conv_of(kind: str) -> nn.Module:
    match kind:
        case "planar":
            return nn.Conv2d(2, 2, 3, padding=1)
        case "full":
            return GConv2d(2, 2, 3, padding=1, group="p4")
    return SeparableGConv2d(2, 2, 3, padding=1, group="p4", form=kind, execution="factorized")


@pytest.mark.parametrize("kind", ["planar", "full", "gc"])
def test_a_parameter_that_two_layers_share_is_counted_once_and_noted(kind: str) -> None:
    one, other = conv_of(kind), conv_of(kind)
    name = "mix" if kind == "gc" else "weight"
    setattr(other, name, getattr(one, name))
    net = nn.Sequential(one, other)
    shape = (2, 8, 8) if kind == "planar" else (2, 4, 8, 8)
    counted, alone = cost(net, shape), cost(one, shape)
    assert counted.parameters == sum(p.numel() for p in net.parameters())
    assert [row.parameters for row in counted.layers] == [
        alone.parameters, alone.parameters - getattr(one, name).numel(),
    ]  # fmt: skip
    assert counted.macs_executed == 2 * alone.macs_executed
    assert counted.notes == (f"1.{name} is 0.{name}, and is counted there",)


def test_layers_that_forward_does_not_call_are_listed_with_their_parameters() -> None:
    net = create_model("p4cnn", width=2)
    plain = cost(net, (1, 28, 28))
    net.auxiliary = nn.Sequential(GConv2d(2, 3, 3, group="p4"), nn.ReLU(), nn.Linear(5, 7))
    counted = cost(net, (1, 28, 28))
    assert counted.layers[: len(plain.layers)] == plain.layers
    assert counted.layers[len(plain.layers) :] == (
        LayerCost("auxiliary.0", "GConv2d", 2 * 3 * 4 * 9 + 3, 0, 0, (0, 0)),
        LayerCost("auxiliary.2", "Linear", 5 * 7 + 7, 0, 0, (0, 0)),
    )
    assert counted.parameters == sum(p.numel() for p in net.parameters())
    assert counted.notes == (
        "auxiliary.0 (GConv2d) was not called; its parameters are counted",
        "auxiliary.2 (Linear) was not called; its parameters are counted",
    )


@pytest.mark.parametrize(("name", "giga"), [("p4m", 3.07), ("g-p4m", 2.09), ("gc-p4m", 2.21)])
def test_the_resnets_macs_are_those_that_the_readme_states(name, giga):
    total = cost(create_model(f"{name}-resnet44"), (3, 32, 32)).macs_published
    assert round(total / 1e9, 2) == giga


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if "irrep" not in form.executions])
def test_an_execution_that_a_form_does_not_have_is_named_and_not_the_shape(form: str) -> None:
    net = create_model("g-p4cnn", width=2, separable=form)
    with pytest.raises(InputError) as error:
        cost(net, net.input_shape, execution="irrep")
    words = f"form {form!r} has no execution 'irrep', which is for gc, gc_in; accepted: auto, dense, factorized"
    assert str(error.value) == words
    layers = [layer for layer in net.modules() if isinstance(layer, SeparableGConv2d)]
    assert len(layers) == 6
    for layer in layers:
        with pytest.raises(InputError) as error:
            layer.execution = "irrep"
        assert str(error.value) == words
        assert layer.execution == "auto"
