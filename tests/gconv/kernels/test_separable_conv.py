"""The kernel of the forms ``gc`` and ``gc_in`` against the definitions, in every version that this processor runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gconv import GROUPS, GConv2d, GroupBatchNorm2d, SeparableGConv2d, create_model, fuse, gconv2d, group
from gconv.functional.expansion import channels_last, from_group_major, to_group_major
from gconv.kernels.dispatch import OVER_PIXELS
from gconv.kernels.library import TensorLifetimeMode
from gconv.system.errors import InputError
from tests.gconv.kernels.comparing import (
    as_defined,
    built,
    close,
    forms,
    kernel_of_pass,
    over_channels,
    versions,
)


@st.composite
def drawn(draw, form, version):
    """A layer of any group, size, rank and sampling, and a map for it."""
    name, k = draw(st.sampled_from(GROUPS)), draw(st.integers(1, 5))
    o, i = draw(st.integers(1, 9)), draw(st.integers(2 if name == "z2" else 1, 9))
    order = group(name).order
    layer = SeparableGConv2d(
        i,
        o,
        k,
        stride=draw(st.integers(1, 1 if version == OVER_PIXELS else 3)),
        padding=draw(st.integers(0, k - 1)),
        bias=draw(st.booleans()),
        group=name,
        form=form,
        rank=draw(st.integers(1, min(4, (i if form == "gc" else o) * order, k * k))),
        execution=draw(st.sampled_from(["factorized", "irrep"])),
    )
    height, width = draw(st.integers(k, 9)), draw(st.integers(k, 70 if k == 3 else 9))
    x = channels_last(torch.randn(draw(st.integers(1, 5)), i * order, height, width))
    return layer, from_group_major(x, order)


@built
@versions
@forms
def test_outputs_and_gradients_are_those_of_the_definition(only, version, form):
    only(version)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def check(data):
        layer, x = data.draw(drawn(form, version))
        y = as_defined(layer, x)
        with torch.no_grad():
            more = channels_last(torch.randn_like(to_group_major(y)))
            more = from_group_major(more, layer.group.order)
            kept = layer.eval()(x)
            assert torch.equal(kept, y)
            torch.testing.assert_close(layer(x, residual=more, relu=True), F.relu(y + more))
            torch.testing.assert_close(layer(x, relu=True), F.relu(y))
            torch.testing.assert_close(layer(x, residual=more), y + more)

    check()


@built
@versions
@forms
@pytest.mark.parametrize(("k", "padding"), [(3, 0), (3, 1), (3, 2), (4, 1), (1, 0)])
def test_maps_larger_than_a_cache(only, version, form, k, padding):
    only(version)
    torch.manual_seed(0)
    layer = SeparableGConv2d(5, 6, k, padding=padding, group="p4", form=form, rank=1 if k == 1 else 2)
    for height, width in ((131, 90), (7, 1500)):
        x = from_group_major(channels_last(torch.randn(2, 20, height, width)), 4)
        y = as_defined(layer, x)
        with torch.no_grad():  # an image by two threads
            torch.testing.assert_close(layer.eval()(x[:1]), y[:1], rtol=1e-4, atol=1e-5)


@built
@over_channels
def test_a_full_filter_as_mixes_of_pixels(only, monkeypatch, version):
    only(version)
    monkeypatch.setattr(GConv2d, "runs_in_irreps", True)  # of any size

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def check(data):
        name, k = data.draw(st.sampled_from(GROUPS)), data.draw(st.integers(1, 4))
        o, i = (data.draw(st.integers(low, 4)) for low in (1, 2))
        stride = data.draw(st.integers(1, 4))
        padding, bias = data.draw(st.integers(0, k - 1)), data.draw(st.booleans())
        layer = GConv2d(i, o, k, stride=stride, padding=padding, bias=bias, group=name)
        side = data.draw(st.integers(k, 9))
        x = channels_last(torch.randn(data.draw(st.integers(1, 3)), i * layer.group.order, side, side + 2))
        x = from_group_major(x, layer.group.order)
        y = as_defined(layer, x)
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), y)

    check()


@built
@forms
def test_the_comparison_sees_a_wrong_kernel(form):
    layer = SeparableGConv2d(3, 4, 3, padding=1, group="p4m", form=form, execution="irrep").eval()
    x = from_group_major(channels_last(torch.randn(2, 24, 5, 5)), 8)
    with torch.no_grad():
        expected = gconv2d(x.double(), layer.weight.double(), layer.bias.double(), layer.group, layer.sampling)
        kernel = kernel_of_pass(layer, x)
        packed = kernel.pack(layer.mix, layer.spatial, layer.bias)
        assert close(kernel.forward(x, packed), expected)
        for at in (0, kernel.weights + kernel.weights_back, packed.numel() - kernel.biases):  # a mix, a plane, the bias
            wrong = packed.clone()
            wrong[at] += 0.1
            assert not close(kernel.forward(x, wrong), expected)


@built
@forms
def test_second_derivatives(form):
    torch.manual_seed(0)
    layer = SeparableGConv2d(2, 3, 3, padding=1, group="p4", form=form, rank=2)
    exact = copy.deepcopy(layer).double()
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)

    def penalty(one, x):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(one(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(one.parameters()))

    kernel_of_pass(layer, x)
    for ours, theirs in zip(penalty(layer, x), penalty(exact, x.double()), strict=True):
        assert close(ours, theirs, 1e-4)


@built
@forms
def test_gradients_of_only_some(form):
    layer = SeparableGConv2d(2, 3, 3, group="p4", form=form)
    layer.mix.requires_grad_(False)
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    y = layer(x)
    y.sum().backward()  # whose gradient is one number, expanded
    assert layer.mix.grad is None
    expected = torch.autograd.grad(
        gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling).sum(), [layer.spatial, layer.bias]
    )
    for ours, theirs in zip((layer.spatial.grad, layer.bias.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@built
def test_what_is_not_a_number_or_infinite_is_not_hidden():
    layer = SeparableGConv2d(2, 3, 3, padding=1, group="p4", form="gc", bias=False).eval()
    x = from_group_major(channels_last(torch.zeros(1, 8, 7, 7)), 4)
    with torch.no_grad():
        for value, relu in ((float("nan"), True), (float("inf"), False)):
            x[0, 0, 0, 3, 3] = value
            y = layer(x, relu=relu)
            assert not y[..., 2:5, 2:5].isfinite().any()
            assert (y[..., 0, :] == 0).all()  # nothing spreads beyond the filter


@built
def test_a_changed_parameter_is_seen():
    layer = SeparableGConv2d(2, 3, 3, group="p4", form="gc").eval()
    x = from_group_major(channels_last(torch.randn(1, 8, 5, 5)), 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            before = layer(x)
            parameter.data.add_(1)
            after = layer(x)
            assert not torch.allclose(before, after)
            expected = gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@forms
@pytest.mark.parametrize("bad", ["float64", "channels_first", "dilation", "empty", "padding"])
def test_everything_else_is_left_to_pytorch(form, bad):
    more = {"dilation": {"dilation": 2}, "padding": {"padding": 3}}.get(bad, {})
    layer = SeparableGConv2d(2, 3, 3, group="p4", form=form, **more)
    x = channels_last(torch.randn(0 if bad == "empty" else 2, 8, 7, 7))
    match bad:
        case "float64":
            layer, x = layer.double(), x.double()
        case "channels_first":
            x = x.contiguous()
    x = from_group_major(x, 4)
    assert kernel_of_pass(layer, x) is None
    expected = gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_what_does_not_fit_is_refused_or_done_by_pytorch_and_never_read_beyond(grad):
    """All of these would be read as if they were of another type or size."""
    x = from_group_major(channels_last(torch.randn(2, 16, 6, 6)), 4)
    with torch.set_grad_enabled(grad):
        for layer in (
            SeparableGConv2d(4, 4, 3, padding=1, group="p4", form="gc"),
            GConv2d(4, 4, 3, group="p4"),
            GConv2d(30, 30, 3, padding=1, group="p4"),
            GroupBatchNorm2d(4),
        ):
            own = from_group_major(channels_last(torch.randn(2, 120, 6, 6)), 4) if layer.weight.shape[0] == 30 else x
            with pytest.raises(RuntimeError):
                layer.train(grad).double()(own)
            layer.float().bias.data = layer.bias.data.double()
            with pytest.raises(RuntimeError):
                layer(own)
        with pytest.raises(RuntimeError):
            GroupBatchNorm2d(3).train(grad)(x)
        layer = SeparableGConv2d(4, 4, 3, padding=1, group="p4", form="gc").train(grad)
        one = from_group_major(channels_last(torch.randn(1, 16, 6, 6)), 4)
        torch.testing.assert_close(layer(x, residual=one), layer(x) + one)
        with pytest.raises(RuntimeError):
            layer(x, residual=one[..., :3])


@built
@forms
@pytest.mark.parametrize("grad", [True, False])
def test_parameters_of_other_shapes_are_not_read_beyond(form, grad):
    x = from_group_major(channels_last(torch.randn(2, 16, 6, 6)), 4)
    for name in ("mix", "spatial", "bias"):
        layer = SeparableGConv2d(4, 5, 3, group="p4", form=form).train(grad)
        parameter = getattr(layer, name)
        parameter.data = parameter.data[:-1]
        with torch.set_grad_enabled(grad), pytest.raises(InputError, match="do not fit their layer; accepted: "):
            layer(x)


class Watching(TensorLifetimeMode):
    """A mode that does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@built
@forms
def test_who_counts_operations_sees_some_and_a_profiler_sees_the_kernel(form):
    layer = SeparableGConv2d(4, 5, 3, padding=1, group="p4", form=form, execution="factorized").eval()
    x = from_group_major(channels_last(torch.randn(2, 16, 6, 6)), 4)
    with torch.no_grad():
        expected = layer(x)
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(layer(x), expected)
        assert counter.get_total_flops() == 2 * 2 * 36 * sum(layer.macs())
        with Watching():
            assert kernel_of_pass(layer, x) is not None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(layer(x), expected)
    assert "gconv::forward" in {event.key for event in profile.key_averages()}


@built
@pytest.mark.parametrize("name", ["gc-p4cnn-small", "gc-p4m-resnet44"])
def test_networks_are_the_same_function(only, monkeypatch, name):
    torch.manual_seed(0)
    net = create_model(name, width=None if "cnn" in name else 2).eval()
    for module in net.modules():
        if isinstance(module, GroupBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.rand(3, *net.input_shape)
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        expected = exact(images.double())
        for ours in (net, fuse(net)):
            assert close(ours(images), expected, 1e-4)

    def gradients(net):
        loss = F.cross_entropy(net.train()(images.to(net.fc.weight)), torch.tensor([1, 2, 3]))
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(net.parameters()))])

    ours, theirs = gradients(net), gradients(exact)
    only(None)
    slow = gradients(net)
    assert not torch.equal(slow, ours)
    assert (ours - theirs).norm() <= 3 * (slow - theirs).norm() + 1e-4 * theirs.norm()


@built
def test_who_looks_at_a_layer_sees_what_it_gives():
    net = fuse(create_model("gc-p4m-resnet44", width=2))
    images = torch.rand(1, 3, 8, 8)
    seen = {}
    with torch.no_grad():
        expected = net(images)
        for name in ("conv1", "conv2"):
            block = net.stage1[0]
            getattr(block, name).register_forward_hook(
                lambda _, x, y, name=name: seen.__setitem__(name, (x[0].clone(), y.clone()))
            )
        torch.testing.assert_close(net(images), expected)
    for name, (x, y) in seen.items():
        layer = getattr(net.stage1[0], name)
        torch.testing.assert_close(y, gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling))
        assert (y < 0).any()
