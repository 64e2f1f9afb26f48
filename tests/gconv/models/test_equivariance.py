"""Every layer commutes with its group wherever the sampling allows it; the measure tells where it does not, and why."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gconv import (
    FORMS,
    GROUPS,
    GConv2d,
    GroupBatchNorm2d,
    GroupMaxPool,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    SpatialMaxPool2d,
    SpatialMeanPool2d,
    equivariance_error,
    group,
)
from gconv.models.equivariance import InexactLayer

EXACT, WRONG = 1e-12, 1e-6

every_kind = pytest.mark.parametrize(
    ("kind", "execution"),
    [("lifting", None), ("full", None), *((form, execution) for form in FORMS for execution in FORMS[form].executions)],
)


@st.composite
def layers(draw, kind, execution, groups=GROUPS, strides=(1, 2, 3)):
    """A float64 layer of that kind: any group, size, rank, padding, dilation."""
    channels = st.integers(1, 3)
    layer = (LiftingConv2d if kind == "lifting" else GConv2d)(
        draw(channels),
        draw(channels),
        draw(st.integers(1, 5)),
        stride=draw(st.sampled_from(strides)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        group=draw(st.sampled_from(groups)),
        dtype=torch.float64,
    )
    if kind not in FORMS:
        return layer
    rank = draw(st.integers(1, FORMS[kind].max_rank(layer.filter_shape)))
    return SeparableGConv2d.like(layer, kind, rank, execution)


def size_with(layer, outputs, left_over=0):
    """The map size on which the layer takes so many steps and leaves so many rows unread at the end."""
    reach = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    return layer.stride[0] * (outputs - 1) + reach + left_over - 2 * layer.padding[0]


def map_for(layer, n, m):
    group_axis = () if isinstance(layer, LiftingConv2d) else (layer.group.order,)
    return torch.randn(2, layer.in_channels, *group_axis, n, m, dtype=torch.float64)


def measure(layer, n, m):
    return equivariance_error(layer, layer.group, map_for(layer, n, m))


# Layers


@every_kind
@given(data=st.data())
def test_stride_1_is_exact_on_every_map(kind, execution, data):
    layer = data.draw(layers(kind, execution, strides=[1]))
    smallest = max(1, size_with(layer, 1))
    report = measure(layer, *(smallest + data.draw(st.integers(0, 5)) for _ in "hw"))
    assert report.max <= EXACT
    assert report.inexact == ()


@every_kind
@given(data=st.data())
def test_a_stride_is_exact_where_it_reads_to_the_last_row(kind, execution, data):
    layer = data.draw(layers(kind, execution, strides=[2, 3]))
    report = measure(layer, *(size_with(layer, data.draw(st.integers(3, 5))) for _ in "hw"))
    assert report.max <= EXACT
    assert report.inexact == ()


@every_kind
@given(data=st.data())
def test_a_stride_that_leaves_rows_unread_is_inexact_and_the_report_says_which_sizes_are_not(kind, execution, data):
    layer = data.draw(layers(kind, execution, [name for name in GROUPS if name != "z2"], strides=[2, 3]))
    stride = layer.stride[0]
    n = size_with(layer, data.draw(st.integers(3, 5)), data.draw(st.integers(1, stride - 1)))
    m = size_with(layer, data.draw(st.integers(3, 5)), data.draw(st.integers(0, stride - 1)))
    report = measure(layer, n, m)
    exact = [size for size in range(n - stride + 1, n + stride) if measure(layer, size, size).max <= EXACT]
    assert report.max > WRONG
    assert report.inexact == (InexactLayer("", (n, m), stride, tuple(exact)),)
    assert len(exact) == 2
    assert exact[0] < n < exact[1]
    below, above = exact
    assert str(report).splitlines()[1:] == [
        f"the layer: stride {stride} on a {n} x {m} map is inexact; {below} x {below} or {above} x {above} is exact"
    ]


@every_kind
@given(data=st.data())
def test_pm_reverses_rows_only_and_z2_nothing(kind, execution, data):
    layer = data.draw(layers(kind, execution, ["z2", "pm"], strides=[2, 3]))
    left_over = st.integers(1, layer.stride[0] - 1)
    n = size_with(layer, 4, data.draw(left_over) if layer.group.name == "z2" else 0)
    report = measure(layer, n, size_with(layer, 4, data.draw(left_over)))
    assert report.max <= EXACT
    assert report.inexact == ()


@pytest.mark.parametrize("name", ["p2", "p4", "pmm", "p4m"])
def test_columns_count_too_where_they_are_reversed(name):
    layer = GConv2d(1, 1, 2, stride=2, group=name, dtype=torch.float64)
    report = measure(layer, 12, 7)
    assert report.max > WRONG
    assert report.inexact == (InexactLayer("", (12, 7), 2, (6, 8)),)


def test_only_the_larger_exact_size_is_named_where_there_is_no_smaller_one():
    layer = GConv2d(1, 1, 2, stride=3, padding=1, group="p4", dtype=torch.float64)
    assert [report.inexact[0].exact_sizes for report in (measure(layer, 1, 1), measure(layer, 2, 2))] == [(3,), (3,)]
    assert str(measure(layer, 1, 1).inexact[0]).endswith("1 x 1 map is inexact; 3 x 3 is exact")


def test_float32_is_exact_to_its_rounding():
    layer = GConv2d(8, 8, 3, padding=1, group="p4m")
    assert 0 < equivariance_error(layer, "p4m", torch.randn(2, 8, 8, 9, 7)).max < 1e-5


# Networks


def network(stride=2):
    return nn.Sequential(
        OrderedDict(
            lift=LiftingConv2d(2, 3, 3, padding=1, group="p4m"),
            norm=GroupBatchNorm2d(3),
            relu=nn.ReLU(),
            down=SeparableGConv2d(3, 4, 3, stride, 1, group="p4m", form="gc_in", rank=2),
            pool=SpatialMaxPool2d(2),
        )
    ).double()


def test_a_network_names_every_layer_at_fault_with_the_size_it_sees():
    x = torch.randn(2, 2, 10, 10, dtype=torch.float64)
    report = equivariance_error(network(), "p4m", x)
    assert report.max > WRONG
    assert report.inexact == (InexactLayer("down", (10, 10), 2, (9, 11)), InexactLayer("pool", (5, 5), 2, (4, 6)))
    assert str(report).splitlines() == [
        f"largest relative equivariance error {report.max:.2e}",
        "down: stride 2 on a 10 x 10 map is inexact; 9 x 9 or 11 x 11 is exact",
        "pool: stride 2 on a 5 x 5 map is inexact; 4 x 4 or 6 x 6 is exact",
    ]
    assert equivariance_error(network(), "p4m", torch.randn(2, 2, 11, 11).double()).max <= EXACT
    assert equivariance_error(network(stride=1), "p4m", x).max <= EXACT


def test_the_kind_of_output_decides_how_it_must_turn():
    x = torch.randn(2, 2, 11, 11, dtype=torch.float64)
    fields = nn.Sequential(network(), SpatialMeanPool2d())  # [N, C, S]
    planar = nn.Sequential(network(), GroupMaxPool())  # [N, C, H, W]
    scores = nn.Sequential(planar, SpatialMeanPool2d(), nn.Linear(4, 10).double())  # [N, classes]
    for module in (fields, planar, scores):
        assert equivariance_error(module, "p4m", x).max <= EXACT
    not_invariant = nn.Sequential(fields, nn.Flatten())
    assert equivariance_error(not_invariant, "p4m", x).max > WRONG


# What is wrong is found


class Ungrouped(nn.Module):
    """A planar module on the planar layout of a map: it knows nothing of the group axis."""

    def __init__(self, inner, order):
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, x):
        return self.inner(x.flatten(1, 2)).unflatten(1, (-1, self.order))


class BiasPerElement(nn.Module):
    """A true group convolution, then an offset for each element of the group."""

    def __init__(self, name):
        super().__init__()
        self.conv = GConv2d(2, 2, 3, group=name)
        self.bias = nn.Parameter(torch.randn(self.conv.group.order, 1, 1))

    def forward(self, x):
        return self.conv(x) + self.bias


def norm_per_element(order):
    norm = nn.BatchNorm2d(2 * order)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return Ungrouped(norm, order)


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "z2"])
@pytest.mark.parametrize(
    "build",
    [
        lambda name: Ungrouped(nn.Conv2d(2 * group(name).order, 3 * group(name).order, 3), group(name).order),
        lambda name: Ungrouped(nn.Conv2d(2 * group(name).order, 3 * group(name).order, 1), group(name).order),
        BiasPerElement,
        lambda name: norm_per_element(group(name).order),
    ],
    ids=["plain convolution", "plain mix", "bias per element", "batch norm per element"],
)
def test_a_layer_that_breaks_the_symmetry_has_a_large_error(name, build):
    x = torch.randn(2, 2, group(name).order, 6, 6, dtype=torch.float64)
    report = equivariance_error(build(name).double(), name, x)
    assert report.errors[0] == 0
    assert min(report.errors[1:]) > 1e-2


@pytest.mark.parametrize(("made_for", "claimed"), [("pmm", "p4"), ("p4", "pmm"), ("p2", "pm"), ("pm", "p2")])
def test_a_layer_of_another_group_of_the_same_order_is_found_out(made_for, claimed):
    layer = GConv2d(2, 3, 3, group=made_for, dtype=torch.float64)
    assert equivariance_error(layer, claimed, map_for(layer, 6, 6)).max > 1e-2


def test_errors_are_listed_by_element():
    symmetric_in_rows = nn.Conv2d(1, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        symmetric_in_rows.weight[..., 2, :] = symmetric_in_rows.weight[..., 0, :]
    x = torch.randn(1, 1, 6, 5, dtype=torch.float64)
    nothing, half_turn, rows, columns = equivariance_error(symmetric_in_rows, "pmm", x).errors
    assert nothing == 0
    assert rows <= EXACT
    assert min(half_turn, columns) > 1e-2


def test_an_output_of_the_wrong_shape_is_infinitely_wrong():
    class Crop(nn.Module):
        def forward(self, x):
            return x[..., :-1, :]

    assert equivariance_error(Crop(), "p4", torch.randn(1, 1, 5, 5)).errors[1] == float("inf")


def test_an_output_of_zeros_is_compared_as_it_is():
    class Zero(nn.Module):
        def forward(self, x):
            return 0 * x

    assert equivariance_error(Zero(), "p4", torch.randn(1, 1, 5, 5)).errors == (0, 0, 0, 0)


def test_measuring_leaves_the_module_as_it_was_even_when_it_fails():
    module = network().train()
    with pytest.raises(InputError, match="LiftingConv2d got an input of shape"):
        equivariance_error(module, "p4m", torch.randn(1, 5, 9, 9).double())
    assert equivariance_error(module, "p4m", torch.randn(1, 2, 11, 11).double()).max <= EXACT
    assert all(not layer._forward_pre_hooks and layer.training for layer in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_an_unknown_group_is_refused():
    with pytest.raises(InputError, match=r"^unknown group 'p3'; accepted: z2, p2, p4, pm, pmm, p4m$"):
        equivariance_error(nn.Identity(), "p3", torch.randn(1, 1, 3, 3))


def test_a_layer_used_at_two_sizes_is_reported_at_the_one_that_is_inexact() -> None:
    pool = SpatialMaxPool2d(3, stride=2)
    network = nn.Sequential(pool, SpatialMaxPool2d(2, stride=1), pool)
    report = equivariance_error(network, "p4", torch.randn(1, 2, 4, 10, 10, dtype=torch.float64))
    assert [(layer.name, layer.size) for layer in report.inexact] == [("0", (10, 10))]
    report = equivariance_error(network, "p4", torch.randn(1, 2, 4, 11, 11, dtype=torch.float64))
    assert [(layer.name, layer.size) for layer in report.inexact] == [("0", (4, 4))]
    assert report.max > 1e-3
