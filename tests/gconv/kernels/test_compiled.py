"""The compiled kernels against the definitions, in every version that this processor runs, and what is done without."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gconv import FORMS, GROUPS, GConv2d, GroupBatchNorm2d, SeparableGConv2d, create_model, fuse, gconv2d, group
from gconv.functional.expansion import channels_last, from_group_major, is_strictly_channels_last, to_group_major
from gconv.kernels import dispatch as choice
from gconv.kernels import library as compiled
from gconv.kernels import separable_conv as onepass
from gconv.kernels.library import TensorLifetimeMode
from gconv.system.errors import InputError

built = pytest.mark.skipif(compiled.library() is None, reason="there was no C compiler")
versions = pytest.mark.parametrize("version", choice.variants() or [0])
forms = pytest.mark.parametrize("form", ["gc", "gc_in"])


@pytest.fixture
def only(monkeypatch):
    """Leaves one version of the kernel, or none."""

    def leave(version=None):
        left = {} if version is None else {version: choice.variants()[version]}
        onepass.kernel_of.cache_clear()
        monkeypatch.setattr(choice, "variants", lambda: left)
        monkeypatch.setattr(choice, "_MOST_PLANES", 10**6)

    yield leave
    onepass.kernel_of.cache_clear()


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
        stride=draw(st.integers(1, 1 if version == choice.PLANES else 3)),
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


def in_kernel(layer, x):
    """What runs, which is to be the kernel."""
    kernel = layer._kernel_for(x, layer._plain_parameters(x))
    assert kernel is not None
    return kernel


def close(ours, theirs, tolerance=1e-5):
    return (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 1e-3)


def as_defined(layer, x):
    """The output of a layer in the kernel, which is that of the definition, as are the gradients."""
    in_kernel(layer, x)
    exact = copy.deepcopy(layer).double()
    given = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y = layer(given[0])
    expected = gconv2d(given[1], exact.weight, exact.bias, exact.group, exact.sampling)
    assert is_strictly_channels_last(to_group_major(y)) or min(y.shape[3:]) == 1 or y.shape[1] * y.shape[2] == 1
    assert close(y, expected)
    direction = torch.rand_like(y)  # sums of either sign could come out as nearly nothing
    ours = torch.autograd.grad(y, [given[0], *layer.parameters()], direction)
    theirs = torch.autograd.grad(expected, [given[1], *exact.parameters()], direction.double())
    for one, other in zip(ours, theirs, strict=True):
        assert close(one, other)
    return y


# --- gc and gc_in


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


@pytest.mark.skipif(choice.PLANES not in choice.variants(), reason="this processor has no AVX-512")
def test_planes_are_for_few_channels():
    def version(channels, on="p4", **more):
        return SeparableGConv2d(channels, channels, 3, group=on, form="gc", **more)._kernel().variant

    assert version(10) == version(8, "p4m") == version(20, "pm") == choice.PLANES
    assert choice.PLANES not in (version(64), version(28, "p4m"), version(10, stride=2), version(12, rank=9))


@built
@versions
def test_a_full_filter_as_mixes_of_pixels(only, monkeypatch, version):
    only(version)
    monkeypatch.setattr(GConv2d, "runs_in_irreps", True)  # of any size

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def check(data):
        name, k = data.draw(st.sampled_from(GROUPS)), data.draw(st.integers(1, 4))
        o, i = (data.draw(st.integers(low, 4)) for low in (1, 2))
        stride = data.draw(st.integers(1, 1 if version == choice.PLANES else 4))
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
@pytest.mark.parametrize("form", FORMS)
def test_a_separable_layer_that_runs_dense_does_as_the_full_one(form):
    """Or a network converted to few parameters would be slower than its original."""
    torch.manual_seed(0)
    layer = SeparableGConv2d(8, 9, 3, padding=1, group="p4m", form=form, rank=2, execution="dense")
    assert layer.runs_in_irreps
    assert layer._kernel() is layer.to_dense()._kernel()
    y = as_defined(layer, from_group_major(channels_last(torch.randn(2, 64, 6, 7)), 8))
    assert y.shape == (2, 9, 8, 6, 7)
    small = SeparableGConv2d(4, 4, 3, group="p4", form=form, execution="dense")
    assert not small.runs_in_irreps
    assert small._kernel() is None


@built
def test_large_full_layers_run_so_and_small_ones_do_not():
    for on, small, large in (("p4", 26, 27), ("p4m", 7, 8)):
        assert not GConv2d(small, small, 3, group=on).runs_in_irreps
        assert GConv2d(large, large, 3, group=on).runs_in_irreps
    assert not GConv2d(100, 100, 3, group="z2").runs_in_irreps


@built
@forms
def test_the_comparison_sees_a_wrong_kernel(form):
    layer = SeparableGConv2d(3, 4, 3, padding=1, group="p4m", form=form, execution="irrep").eval()
    x = from_group_major(channels_last(torch.randn(2, 24, 5, 5)), 8)
    with torch.no_grad():
        expected = gconv2d(x.double(), layer.weight.double(), layer.bias.double(), layer.group, layer.sampling)
        kernel = in_kernel(layer, x)
        packed = kernel.pack(layer.mix, layer.spatial, layer.bias)
        assert close(kernel.forward(x, packed), expected)
        for at in (0, kernel.weights + kernel.weights_back, packed.numel() - kernel.biases):  # a mix, a plane, the bias
            wrong = packed.clone()
            wrong[at] += 0.1
            assert not close(kernel.forward(x, wrong), expected)


@built
@forms
@versions
@pytest.mark.parametrize("n", [1, 2, 5])
def test_threads_change_nothing_forward_and_nothing_from_one_time_to_the_next(only, version, form, n):
    only(version)
    torch.manual_seed(0)
    stride = 1 if version == choice.PLANES else 2
    layer = SeparableGConv2d(5, 6, 3, stride=stride, padding=1, group="p4m", form=form, rank=2)
    x = from_group_major(channels_last(torch.randn(n, 40, 11, 9)), 8).requires_grad_()
    threads = torch.get_num_threads()
    outputs, gradients = [], []
    assert in_kernel(layer, x).variant == version
    try:
        for number in (1, 3, 3):
            torch.set_num_threads(number)
            y = layer(x)
            outputs.append(y)
            gradients.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    for one, several, again in zip(*gradients, strict=True):
        assert torch.equal(several, again)
        torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-4)


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

    in_kernel(layer, x)
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
    assert layer._kernel_for(x, layer._plain_parameters(x)) is None
    expected = gconv2d(x, layer.weight, layer.bias, layer.group, layer.sampling)
    torch.testing.assert_close(layer(x), expected)


@forms
def test_without_a_compiler_all_is_as_before(only, monkeypatch, form):
    layer = SeparableGConv2d(2, 3, 3, group="p4", form=form, execution="irrep")
    norm = GroupBatchNorm2d(3)
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    with_it = [norm.train(mode)(layer(x)) for mode in (True, False)]
    only(None)
    monkeypatch.setattr(compiled, "library", lambda: None)
    monkeypatch.setattr("gconv.nn.batchnorm.library", lambda: None)
    norm.reset_running_stats()
    assert layer._kernel_for(x, layer._plain_parameters(x)) is None
    for now, before in zip([norm.train(mode)(layer(x)) for mode in (True, False)], with_it, strict=True):
        torch.testing.assert_close(now, before)
    assert SeparableGConv2d(9, 9, 3, group="p4m", form=form).execution == "factorized"


def test_a_library_that_cannot_be_loaded_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert compiled.library.__wrapped__() is None
    (tmp_path / f"_compiled{compiled.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert compiled.library.__wrapped__() is None


@built
def test_function_transforms_and_derivatives_along_work():
    layer = SeparableGConv2d(2, 3, 3, group="p4", form="gc").eval()
    norm = GroupBatchNorm2d(3).eval()
    x = from_group_major(channels_last(torch.randn(2, 8, 5, 5)), 4)
    direction = torch.randn_like(x)

    def run(x):
        return norm(layer(x))

    with torch.no_grad():
        expected = run(x)
        each = torch.func.vmap(lambda one: run(one[None])[0])(x.contiguous())
        torch.testing.assert_close(each, expected)
        shift = (run(x + 1e-2 * direction) - run(x - 1e-2 * direction)) / 2e-2
    y, along = torch.func.jvp(run, (x,), (direction,))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(along, shift, rtol=1e-3, atol=1e-3)


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
        with TensorLifetimeMode():
            assert layer._kernel_for(x, layer._plain_parameters(x)) is not None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(layer(x), expected)
    assert "gconv::forward" in {event.key for event in profile.key_averages()}


@built
def test_no_memory_is_said(monkeypatch):
    monkeypatch.setattr(compiled, "require_library", lambda: SimpleNamespace(gconv_forward=lambda *_: 1))
    layer = SeparableGConv2d(4, 5, 3, group="p4").eval()
    x = from_group_major(channels_last(torch.randn(2, 16, 6, 6)), 4)
    kernel = in_kernel(layer, x)
    with pytest.raises(MemoryError, match="gconv::forward"):
        kernel.forward(x, torch.zeros(1))


# --- in networks


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
    monkeypatch.setattr("gconv.nn.batchnorm.library", lambda: None)
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


# --- ordinary convolutions of few channels

narrow = pytest.mark.skipif(not compiled.convolves(), reason="this processor has no AVX-512")


@narrow
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_small_convolutions_are_those_of_pytorch(data):
    k = data.draw(st.integers(1, 4))
    channels, out_channels = data.draw(st.integers(1, 9)), 8 * data.draw(st.integers(1, 12))
    shape = data.draw(st.integers(1, 4)), channels, data.draw(st.integers(k, 7)), data.draw(st.integers(k, 19))
    x, weight = channels_last(torch.randn(shape)), torch.randn(out_channels, channels, k, k)
    bias = torch.randn(out_channels) if data.draw(st.booleans()) else None
    relu = data.draw(st.booleans())
    y = compiled.small_conv2d(x, weight.permute(2, 3, 1, 0).contiguous(), bias, relu)
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double())
    expected = F.relu(expected) if relu else expected
    assert close(y, expected)
    wrong = compiled.small_conv2d(x, 1.01 * weight.permute(2, 3, 1, 0).contiguous(), bias, relu)
    assert not close(wrong, expected) or expected.abs().max() < 1e-3
    assert compiled.small_conv2d(x[:0], weight.permute(2, 3, 1, 0).contiguous(), bias, relu).shape == (0, *y.shape[1:])


@narrow
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False), (False, False, True)])
def test_their_gradients_are_those_of_pytorch_and_have_some(needs):
    torch.manual_seed(0)
    x, weight, bias = channels_last(torch.randn(2, 3, 6, 7)), torch.randn(16, 3, 3, 3), torch.randn(16)
    ours = [
        tensor.clone(memory_format=torch.preserve_format).requires_grad_(need)
        for tensor, need in zip((x, weight, bias), needs, strict=True)
    ]
    theirs = [tensor.double().requires_grad_(need) for tensor, need in zip((x, weight, bias), needs, strict=True)]
    found = []
    for x, weight, bias in (ours, theirs):
        y = compiled.convolve(x, weight, bias, 1, 0, 1)
        assert ("_Convolution" in type(y.grad_fn).__name__) == (x.dtype == torch.float32)
        given = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
        first = torch.autograd.grad(y.tanh().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given)
        found.append([y, *first, *second])
    for one, other in zip(*found, strict=True):
        assert close(one, other, 1e-4)


@narrow
def test_a_fused_network_of_few_channels_runs_so(monkeypatch):
    torch.manual_seed(0)
    net = create_model("p4cnn").eval()
    fused = fuse(net)
    images = torch.rand(5, 1, 28, 28)
    called = []
    small_conv2d = compiled.small_conv2d
    monkeypatch.setattr("gconv.deploy.program.small_conv2d", lambda *of: called.append(of) or small_conv2d(*of))
    with torch.no_grad():
        for some in (images, images[:1]):
            called.clear()
            torch.testing.assert_close(fused(some), net(some), rtol=1e-4, atol=1e-5)
            assert len(called) == 7
        images[0, 0, 14, 14] = float("nan")
        scores = fused(images)
    assert scores[0].isnan().all()
    assert scores[1:].isfinite().all()


# --- batch norm


@st.composite
def drawn_maps(draw):
    """A map with values far from zero, and its group."""
    order, channels = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(2, 9))
    shape = draw(st.integers(1, 5)), order * channels, draw(st.integers(2, 20)), draw(st.integers(2, 9))
    scale, shift = 10.0 ** draw(st.integers(-3, 3)), draw(st.sampled_from([0, 1, 30]))
    x = channels_last(scale * (torch.randn(shape) + shift))
    return from_group_major(x, order) if order > 1 else x


@built
@settings(max_examples=60, deadline=None)
@given(drawn_maps(), st.booleans(), st.integers(1, 3))
def test_batch_norm_is_that_of_the_definition(x, relu, threads):
    norm = GroupBatchNorm2d(x.shape[1])
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    exact = nn.BatchNorm3d(x.shape[1], eps=norm.eps).double()
    exact.load_state_dict(norm.state_dict())
    given = x.requires_grad_(), x.detach().double().requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = norm(given[0], relu=relu)
        expected = exact(given[1] if x.dim() == 5 else given[1].unsqueeze(2)).view(y.shape)
        apart = y.detach().double().sign() == expected.sign()  # ReLU is undecided where rounding decides
        expected = F.relu(expected) if relu else expected
        direction = torch.randn_like(y) * apart
        ours = torch.autograd.grad(y, [given[0], *norm.parameters()], direction)
    finally:
        torch.set_num_threads(before)
    theirs = torch.autograd.grad(expected, [given[1], *exact.parameters()], direction.double())
    far = (x.mean() / x.std()).abs().item()  # of values far from zero less is left
    assert close(y, expected, 1e-5 * (1 + far))
    assert close(ours[0], theirs[0], 1e-5 * (1 + 3 * far))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).abs().max() <= 1e-3 * max(other.abs().max(), direction.abs().sum().item() / 50)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name).double(), getattr(exact, name), rtol=1e-3, atol=1e-6)


@built
def test_sums_of_many_positions_do_not_drift():
    torch.manual_seed(0)
    x = channels_last(100 + torch.randn(16, 16, 64, 64))
    y, mean, var = compiled.norm_train(x, torch.ones(2), torch.zeros(2), 8, 0.0, False)
    exact = x.double().unflatten(1, (8, 2))
    torch.testing.assert_close(mean.double(), exact.mean((0, 1, 3, 4)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 1, 3, 4), unbiased=False), rtol=1e-5, atol=0)
    assert y.mean().abs() < 1e-4


@built
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_keeps_what_is_not_a_number(train):
    norm = GroupBatchNorm2d(2).train(train)
    x = from_group_major(channels_last(torch.randn(2, 8, 3, 3)), 4)
    x[0, 1, 2, 1, 1] = float("nan")
    with torch.no_grad():
        y = norm(x, relu=True)
    assert y[0, 1, 2, 1, 1].isnan()
    assert y[:, 0].isfinite().all()
    assert y[:, 1].isnan().all() if train else y.isnan().sum() == 1
