"""Batch norm by way of PyTorch's kernels for single maps, against its own batch norm over channels in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gconv import GroupBatchNorm2d, InputError, create_model, group
from gconv.functional.expansion import from_group_major
from gconv.models import networks as models
from gconv.nn import batchnorm as norm

few = settings(max_examples=25)
orders = pytest.mark.parametrize("order", [group(name).order for name in ("p2", "p4", "p4m")], ids=["p2", "p4", "p4m"])
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(1, 5))  # n, c, height, width
OPTIONS = (
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 0.3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)
options = st.sampled_from(OPTIONS)
MEANS = st.sampled_from([5, 1000])  # near zero in standard deviations, and far from it


@pytest.fixture(autouse=True)
def _always_by_way_of_single_maps(request, monkeypatch):
    if "natively" not in request.node.name:
        monkeypatch.setattr(norm, "_is_slow_natively", lambda x: True)


def drawn(c: int, **options) -> GroupBatchNorm2d:
    """In double precision, with weights and statistics that differ from channel to channel."""
    made = GroupBatchNorm2d(c, dtype=torch.float64, **options)
    for tensor in (made.weight, made.bias, made.running_mean, made.running_var):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 2)
    return made


def native(ours: GroupBatchNorm2d) -> nn.BatchNorm3d:
    """PyTorch's batch norm over ``[N, C, S, H, W]``, with the same numbers."""
    theirs = nn.BatchNorm3d(
        ours.num_features, ours.eps, ours.momentum, ours.affine, ours.track_running_stats, dtype=torch.float64
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs.train(ours.training)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@orders
@few
@given(shape=shapes, options=options, training=st.booleans(), steps=st.integers(1, 3), relu=st.booleans(), mean=MEANS)
def test_it_is_pytorchs_batch_norm(order, shape, options, training, steps, relu, mean):
    """And its ReLU, if asked: outputs, statistics and all gradients, over several steps."""
    n, c, height, width = shape
    ours = drawn(c, **options).train(training)
    theirs = native(ours)
    for _ in range(steps):
        x = (3 * torch.randn(n, c, order, height, width, dtype=torch.float64) + mean).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        y, expected = ours(x, relu=relu), theirs(twin)
        expected = expected.relu() if relu else expected
        close(y, expected)
        weights = torch.randn_like(y)
        found = torch.autograd.grad((y * weights).sum(), [x, *ours.parameters()])
        wanted = torch.autograd.grad((expected * weights).sum(), [twin, *theirs.parameters()])
        for a, b in zip(found, wanted, strict=True):
            close(a, b)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        close(ours.state_dict()[name], value)


@orders
@few
@given(shape=shapes, seed=st.integers(0, 10), relu=st.booleans(), mean=st.sampled_from([20, 60]))
def test_in_single_precision_it_is_as_good_as_the_native_one(order, shape, seed, relu, mean):
    """Channels-last, which is what this way is for; far from zero, where a variance is easily lost."""
    n, c, height, width = shape
    ours = drawn(c)
    theirs = native(ours)
    ours.float()
    x = 3 * torch.randn(n, c * order, height, width) + mean
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    twin = x.detach().double().requires_grad_()
    y, expected = ours(x.unflatten(1, (c, order)), relu=relu), theirs(twin.unflatten(1, (c, order)))
    if relu:  # what is within rounding of zero passes its gradient or not
        expected = torch.where(y > 0, expected, 0)
    close(y, expected, 1e-4)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), [x, *ours.parameters()])
    wanted = torch.autograd.grad((expected * weights).sum(), [twin, *theirs.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(theirs, name), rtol=1e-5, atol=1e-5)


def test_a_mean_over_many_images_is_summed_in_parts():
    """Some 10 million values far from zero: one sum of them in single precision loses the fourth digit."""
    x = torch.rand(150, 8, 90, 90).clone(memory_format=torch.channels_last) + 100
    mean, var, count = norm._statistics(x, 4)
    maps = from_group_major(x.double(), 4).transpose(0, 1).flatten(1)
    close(mean, maps.mean(1), 3e-7)
    close(var, maps.var(1, correction=0), 1e-3)
    assert count == maps.shape[1]


@orders
@few
@given(shape=shapes, affine=st.booleans(), relu=st.booleans())
def test_second_derivatives_are_the_native_ones(order, shape, affine, relu):
    n, c, height, width = shape
    ours = drawn(c, affine=affine)
    theirs = native(ours)
    x = torch.randn(n, c, order, height, width, dtype=torch.float64)
    weights = torch.randn_like(x)

    def second(layer: nn.Module) -> tuple[Tensor, ...]:
        into = [x.clone().requires_grad_(), *layer.parameters()]
        y = layer(into[0], relu=relu) if layer is not theirs else layer(into[0]).relu() if relu else layer(into[0])
        first = torch.autograd.grad((y * weights).sin().sum(), into, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), into)

    for a, b in zip(second(ours), second(theirs), strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_gradients_by_finite_differences(relu):
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.rand(2, 2, dtype=torch.float64).requires_grad_().unbind()

    def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm._Normalise.apply(x, weight, bias, 2, 1e-5, relu)[0]

    inputs = x, weight.detach().requires_grad_(), bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(normalised, inputs)
    assert torch.autograd.gradgradcheck(normalised, inputs)


@pytest.mark.parametrize("track", [True, False])
def test_a_single_value_per_channel_has_no_variance(track):
    layer = drawn(3, track_running_stats=track)
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel when training, got input size"):
        norm._Normalise.apply(torch.ones(1, 3, 1, 1), torch.ones(3), torch.ones(3), 1, 1e-5, False)
    assert layer(torch.randn(1, 3, 2, 1, 1, dtype=torch.float64)).shape == (1, 3, 2, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3, 1, 1, 1, dtype=torch.float64))


def test_half_precision_maps_have_statistics_in_single_precision():
    layer, twin = GroupBatchNorm2d(2), nn.BatchNorm3d(2)
    x = (torch.randn(3, 2, 4, 5, 5) + 2).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), twin(theirs)
    assert (y.dtype, layer.running_mean.dtype) == (torch.bfloat16, torch.float32)
    close(y, expected, 2e-2)
    close(layer.running_mean, twin.running_mean, 1e-4)
    close(layer.running_var, twin.running_var, 1e-4)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    close(ours.grad, theirs.grad, 3e-2)
    close(layer.weight.grad, twin.weight.grad, 2e-2)


def test_only_maps_that_the_native_kernel_would_copy_do_not_go_natively(monkeypatch):
    ways = []
    normalised = GroupBatchNorm2d._normalised
    monkeypatch.setattr(GroupBatchNorm2d, "_normalised", lambda *of: ways.append(of) or normalised(*of))
    x = torch.randn(2, 8, 5, 5)
    last = x.clone(memory_format=torch.channels_last)
    layer = GroupBatchNorm2d(2)
    for maps in (x, x.double()):
        layer.to(maps.dtype)(maps.unflatten(1, (2, 4)))
    GroupBatchNorm2d(8)(last)
    layer.float().eval()(last.unflatten(1, (2, 4)))
    assert ways == []
    layer.train()(last.unflatten(1, (2, 4)))
    layer(from_group_major(x, 4))
    layer(from_group_major(last, 4))
    assert len(ways) == 3


NETWORKS = [("p4cnn", {}), ("gc-p4cnn", {}), ("g-p4cnn", {}), ("p4cnn", {"group": "p4m"}), ("p4cnn", {"group": "p2"})]
NETWORKS += [("p4cnn", {"separable": "gc_in"}), ("z2cnn", {})]


@pytest.mark.parametrize(("name", "options"), NETWORKS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_channels_last_what_it_is_natively_and_contiguous(monkeypatch, name, options, training):
    """In single precision; each is as far from the network in double precision as the other."""
    model = create_model(name, width=3, **options).train(training)
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6)

    def passed(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        twin = copy.deepcopy(model).to(dtype)
        scores = twin(images.to(dtype))
        nn.functional.cross_entropy(scores, labels).backward()
        statistics = [value for key, value in twin.state_dict().items() if "running" in key]
        return [scores.detach(), *statistics, *(parameter.grad for parameter in twin.parameters())]

    last = passed()
    exact = passed(torch.float64)
    monkeypatch.setattr(models, "channels_last", lambda x: x)
    contiguous = passed()
    largest = max(float(value.abs().max()) for value in exact)  # some biases have no gradient but by rounding
    for a, b, c in zip(last, contiguous, exact, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * largest
        assert float((a - c).abs().max()) <= 2e-5 * largest


def test_the_relu_of_a_network_is_in_the_norm_unless_somebody_looks_at_the_norm(monkeypatch):
    torch.manual_seed(0)
    model, images = create_model("p4cnn", width=2), torch.rand(4, 1, 28, 28)
    asked, normalised = [], GroupBatchNorm2d._normalised
    monkeypatch.setattr(
        GroupBatchNorm2d, "_normalised", lambda norm, x, *how: asked.append(how[1]) or normalised(norm, x, *how)
    )
    expected = model(images)
    assert asked.count(True) == 6  # not the one before the pool
    seen = []
    model.bn4.register_forward_hook(lambda module, given, output: seen.append(output))
    asked.clear()
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert asked.count(True) == 5
    assert float(seen[0].detach().min()) < 0


def test_a_distributed_run_has_no_second_derivatives(monkeypatch):
    monkeypatch.setattr(norm, "processes", lambda: 2)
    monkeypatch.setattr(norm, "sum_over_processes", lambda values: values)
    x = torch.randn(2, 2, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(GroupBatchNorm2d(2)(x).square().sum(), x, retain_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(InputError, match="no second derivatives"):
        torch.autograd.grad(GroupBatchNorm2d(2)(x).sin().sum(), x, create_graph=True)
