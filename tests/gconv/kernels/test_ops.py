"""The kernel as an operator that PyTorch knows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gconv import GConv2d, SeparableGConv2d, gconv2d
from gconv.functional.expansion import channels_last, from_group_major
from gconv.kernels.ops import separable_conv
from tests.gconv.kernels.comparing import built, close, forms


def given(form, *, dtype=torch.float32, name="p4", k=3, stride=1, bias=True, grouped=True, rank=2):
    """A layer, and what the operator takes for it."""
    layer = SeparableGConv2d(
        3, 4, k, stride=stride, padding=1, group=name, form=form, rank=rank, bias=bias, execution="irrep", dtype=dtype
    )
    order = layer.group.order
    x = torch.randn(2, 3 * order, 6, 7, dtype=dtype)
    x = from_group_major(channels_last(x) if grouped else x, order).requires_grad_()
    settings = name, layer.form.spatial_first, stride, 1, True
    return layer, x, (x, layer.mix, layer.spatial, layer.bias, *settings)


def close_to_the_definition(layer, x, arguments):
    y = separable_conv(*arguments)
    expected = gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
    assert close(y, expected)
    direction = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], direction)
    theirs = torch.autograd.grad(expected, [x, *layer.parameters()], direction)
    for one, other in zip(ours, theirs, strict=True):
        assert close(one, other)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_definition_with_its_gradients(form, dtype, grouped, bias):
    close_to_the_definition(*given(form, dtype=dtype, grouped=grouped, bias=bias, name="p4m", stride=2))


@forms
def test_it_runs_without_the_kernel(only, form):
    only(None)
    close_to_the_definition(*given(form))


@forms
def test_pytorch_finds_nothing_wrong_with_it(form):
    torch.library.opcheck(separable_conv, given(form, grouped=form == "gc", bias=form == "gc")[2])


@built
@forms
def test_a_changed_parameter_is_seen(form):
    layer, x, arguments = given(form)
    for parameter in layer.parameters():
        with torch.no_grad():
            before = separable_conv(*arguments)
            parameter.data.add_(1)  # which no counter of versions sees
            assert not torch.allclose(separable_conv(*arguments), before)
        close_to_the_definition(layer, x, arguments)


@forms
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_its_flops_are_those_of_the_products(form, stride, backward):
    layer, _, arguments = given(form, stride=stride)
    with FlopCounterMode(display=False) as counter:
        y = separable_conv(*arguments)
        if backward:
            y.sum().backward()
    of_input, of_output = layer.macs()
    macs = 2 * (of_input * 6 * 7 + of_output * y.shape[3] * y.shape[4])
    assert counter.get_total_flops() == 2 * macs * (3 if backward else 1)


@built
@pytest.mark.parametrize(
    "layer", [SeparableGConv2d(4, 4, 3, padding=1, group="p4", form="gc"), GConv2d(30, 30, 3, group="p4")]
)
def test_a_compiled_layer_keeps_the_kernel_and_an_exported_one_does_not_need_it(layer):
    x = from_group_major(channels_last(torch.randn(2, 4 * layer.in_channels, 6, 7)), 4)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(x)
    # With the generic version full layers are expanded.
    in_kernel = isinstance(layer, SeparableGConv2d) or layer.runs_in_irreps
    assert ("gconv::forward" in {event.key for event in profile.key_averages()}) == in_kernel
    direction = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(run(x), list(layer.parameters()), direction) for run in (compiled, layer))
    for one, other in zip(ours, theirs, strict=True):
        assert close(one, other)
    torch.compiler.reset()
    exported = torch.export.export(layer, (x,))
    assert not any("gconv" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
