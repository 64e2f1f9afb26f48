"""The networks that speed is compared with compute what this package's networks do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gconv
from benchmarks.speed_networks import twin
from benchmarks.twins import Escnn, Kit, ListConv, Lists, Plain, TwinCNN, escnn_exported, has_escnn
from gconv.functional.expansion import expand

NORMS = (gconv.GroupBatchNorm2d, nn.BatchNorm2d, nn.BatchNorm3d)
NAMES = {"p4cnn": 4, "p4m-resnet44": 8}


@pytest.mark.parametrize("group", ["p4", "p4m"])
@pytest.mark.parametrize("kind", [gconv.LiftingConv2d, gconv.GConv2d], ids=["lifting", "full"])
def test_a_layer_that_expands_through_lists_is_the_layer(kind: Any, group: str) -> None:
    layer = kind(2, 3, 3, group=group, padding=1, dtype=torch.float64)
    twin = ListConv(group, layer.weight.shape, bias=True, padding=1)
    twin.weight, twin.bias = layer.weight, layer.bias
    x = torch.randn(2, 2, layer.filter_shape.order, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-12, atol=1e-12)


def parts(net: nn.Module, kinds: tuple[type, ...]) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, kinds)]


def given_the_weights(twin: nn.Module, net: gconv.Model, order: int) -> nn.Module:
    """The twin with the parameters and statistics of a network, expanded where its layers are ordinary ones."""
    convs = parts(twin, (nn.Conv2d, ListConv))
    for mine, theirs in zip(parts(net, (gconv.GConv2d, gconv.LiftingConv2d)), convs, strict=True):
        ordinary = isinstance(theirs, nn.Conv2d)
        theirs.weight.data = expand(mine.weight.data, mine.tables.expansion) if ordinary else mine.weight.data
        if mine.bias is not None:
            theirs.bias.data = mine.bias.data.repeat_interleave(order if ordinary else 1)
    for mine, theirs in zip(parts(net, NORMS), parts(twin, NORMS), strict=True):
        for name, value in mine.state_dict().items():
            times = theirs.num_features // mine.num_features if value.dim() else 1
            getattr(theirs, name).data = value.repeat_interleave(times) if times > 1 else value.clone()
    twin.fc.load_state_dict(net.fc.state_dict())  # type: ignore[union-attr, operator]
    return twin.double().eval()


def trained(name: str) -> tuple[gconv.Model, Tensor]:
    net = gconv.create_model(name, width=2).double()
    images = torch.rand(3, *net.input_shape, dtype=torch.float64)
    for norm in parts(net, NORMS):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    net(images)
    return net.eval(), images


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["contiguous", "channels-last", "lists"])
def test_a_twin_is_the_network(name: str, kind: str) -> None:
    net, images = trained(name)
    kits: dict[str, Kit] = {
        "contiguous": Plain(NAMES[name]),
        "channels-last": Plain(NAMES[name], channels_last=True),
        "lists": Lists(net.spec.group),
    }
    made = given_the_weights(twin(net, kits[kind]), net, NAMES[name])
    expected = net(images)
    torch.testing.assert_close(made(images), expected, rtol=1e-10, atol=1e-10)
    if kind == "lists":
        assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in net.parameters())


@pytest.mark.skipif(not has_escnn(), reason="escnn is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_what_escnn_exports_is_its_network(name: str) -> None:
    net = gconv.create_model(name, width=1)
    made = twin(net, Escnn(net.spec.group)).eval()
    images = torch.rand(2, *net.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(escnn_exported(made, NAMES[name])(images), made(images), rtol=1e-5, atol=1e-5)


def test_the_plain_twin_of_a_planar_network_is_as_wide_as_the_network() -> None:
    net = gconv.create_model("z2cnn", width=3)
    made = twin(net, Plain(1))
    assert isinstance(made, TwinCNN)
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in net.parameters())
