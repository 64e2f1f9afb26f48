"""Networks lowered to ordinary layers: the same function, without anything of this package."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gconv.deploy.fuse import to_plain
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS
from gconv.models.cost import cost
from gconv.models.networks import Model
from gconv.models.zoo import MODELS, create_model
from gconv.nn.batchnorm import GroupBatchNorm2d
from gconv.nn.pooling import GroupMeanPool
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError


def trained(net: Model) -> Model:
    """In eval mode, with batch norms that know the maps, so that no unit is dead."""
    for norm in net.modules():
        if isinstance(norm, GroupBatchNorm2d):
            norm.momentum = 1.0
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.5, 0.5)
    net.train()(torch.rand(5, *net.input_shape, dtype=net.fc.weight.dtype))
    return net.eval()


def separated(net: Model, *choices: tuple[str, int, str] | None) -> Model:
    """With the layers conv2, conv3, … in these forms, ranks and executions; None is full."""
    for number, choice in enumerate(choices, start=2):
        if choice is not None:
            layer = net.get_submodule(f"conv{number}")
            net.set_submodule(f"conv{number}", SeparableGConv2d.like(layer, *choice))
    return net


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@settings(max_examples=25)
@given(data=st.data())
def test_a_plain_network_is_the_same_function(data):
    on = data.draw(st.sampled_from([name for name in GROUPS if name != "z2"]))
    net = create_model("p4cnn", group=on, width=2, in_channels=data.draw(st.integers(1, 2)))
    for number in range(2, 8):
        form = data.draw(st.sampled_from([None, *FORMS]))
        if form is not None:
            layer = net.get_submodule(f"conv{number}")
            rank = data.draw(st.integers(1, FORMS[form].max_rank(layer.filter_shape)))
            separable = SeparableGConv2d.like(layer, form, rank, data.draw(st.sampled_from(FORMS[form].executions)))
            net.set_submodule(f"conv{number}", separable)
    net = trained(net.double())
    images = torch.rand(data.draw(st.sampled_from([1, 2, 7])), *net.input_shape, dtype=torch.float64)
    with torch.no_grad():
        assert off(to_plain(net)(images), net(images)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_every_published_network_becomes_ordinary_layers(name):
    net = trained(create_model(name, width=2))
    plain = to_plain(net)
    images = torch.rand(3, *net.input_shape)
    with torch.no_grad():
        assert off(plain(images), net(images)) < 1e-5
    assert {type(module) for module in plain.modules() if any(True for _ in module.parameters(recurse=False))} <= {
        nn.Conv2d,
        nn.Linear,
        nn.BatchNorm2d,
    }
    assert all(type(module).__module__.startswith("torch.") for module in list(plain.modules())[1:])
    assert not any(module.training for module in plain.modules())
    for layer in net.modules():  # which ordinary layers mix directly
        if isinstance(layer, SeparableGConv2d) and layer.resolved_execution == "irrep":
            layer.execution = "factorized"
    assert cost(plain, net.input_shape).macs_executed == cost(net, net.input_shape).macs_executed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_forms_that_are_two_convolutions_stay_two_and_the_others_become_one(form, rank):
    net = separated(create_model("p4cnn", width=2), *[(form, rank, "factorized")] * 6)
    layers = dict(to_plain(net).named_modules())
    chained = form in ("gc", "gc_in")
    assert isinstance(layers["conv3"], nn.Conv2d) is not chained
    execution = "factorized" if chained else "dense"
    expected = cost(net, net.input_shape, execution=execution)
    assert cost(to_plain(net), net.input_shape).macs_executed == expected.macs_executed


def test_a_layer_that_runs_dense_becomes_one_convolution():
    net = separated(create_model("p4cnn", width=2), *[("gc", 2, "dense")] * 6)
    assert isinstance(to_plain(net).conv3, nn.Conv2d)


def test_a_plain_resnet_takes_images_of_other_sizes():
    net = trained(create_model("p4m-resnet44", width=2, depth=8))
    images = torch.rand(2, 3, 40, 24)
    with torch.no_grad():
        assert off(to_plain(net)(images), net(images)) < 1e-5


def test_what_is_made_does_not_depend_on_the_original_any_more():
    net = trained(create_model("gc-p4m-resnet44", width=1))
    net.train()
    before, text, random = deepcopy(net.state_dict()), repr(net), torch.get_rng_state()
    made = to_plain(net)
    assert torch.get_rng_state().equal(random)
    for tensor in made.state_dict().values():
        tensor.zero_()
    assert repr(net) == text
    assert all(module.training for module in net.modules())
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_a_layer_without_a_counterpart_is_named():
    net = create_model("p4cnn", width=1)
    net.group_pool = GroupMeanPool()
    with pytest.raises(InputError, match="group_pool is a GroupMeanPool, which has no ordinary counterpart"):
        to_plain(net)
