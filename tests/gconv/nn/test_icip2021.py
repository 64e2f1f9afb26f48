"""The ICIP names: their signature, and nothing but the general layers behind them."""

import inspect

import pytest
import torch

import gconv
from gconv import GConv2d, LiftingConv2d, SeparableGConv2d

LAYERS = {
    "P4ConvZ2": (LiftingConv2d, {"group": "p4"}),
    "P4ConvP4": (GConv2d, {"group": "p4"}),
    "gP4ConvP4": (SeparableGConv2d, {"group": "p4", "form": "g", "rank": 1}),
    "gcP4ConvP4": (SeparableGConv2d, {"group": "p4", "form": "gc", "rank": 1}),
    "P4MConvZ2": (LiftingConv2d, {"group": "p4m"}),
    "P4MConvP4M": (GConv2d, {"group": "p4m"}),
    "gP4MConvP4M": (SeparableGConv2d, {"group": "p4m", "form": "g", "rank": 1}),
    "gcP4MConvP4M": (SeparableGConv2d, {"group": "p4m", "form": "gc", "rank": 1}),
}

every_name = pytest.mark.parametrize("name", LAYERS)


@every_name
def test_signature_is_the_published_one(name):
    parameters = inspect.signature(getattr(gconv, name)).parameters
    by_position = [name for name, parameter in parameters.items() if parameter.kind != parameter.KEYWORD_ONLY]
    assert by_position == ["in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"]
    assert [parameters[optional].default for optional in ("stride", "padding", "bias")] == [1, 0, True]


@every_name
@pytest.mark.parametrize("bias", [True, False])
def test_the_alias_is_the_general_layer(name, bias):
    kind, fixed = LAYERS[name]
    alias = getattr(gconv, name)(2, 3, 3, 2, 1, bias)
    general = kind(2, 3, 3, stride=2, padding=1, bias=bias, **fixed)
    general.load_state_dict(alias.state_dict())
    x = torch.randn(2, 2, alias.filter_shape.order, 7, 9)
    assert isinstance(alias, kind)
    assert alias.extra_repr() == general.extra_repr()
    assert alias(x).equal(general(x))


@pytest.mark.parametrize("order", [4, 8])
def test_g_and_gc_filters_are_the_papers_outer_products(order):
    suffix = {4: "P4ConvP4", 8: "P4MConvP4M"}[order]
    g, gc = (getattr(gconv, prefix + suffix)(2, 3, 3) for prefix in ("g", "gc"))
    torch.testing.assert_close(g.weight, g.mix.view(3, 2, order, 1, 1) * g.spatial.view(3, 2, 1, 3, 3))
    torch.testing.assert_close(gc.weight, gc.mix.view(3, 2, order, 1, 1) * gc.spatial.view(3, 1, 1, 3, 3))
