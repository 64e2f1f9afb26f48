"""The slow twin of the speed benchmark computes what the layers do."""

import pytest
import torch

import gconv
from benchmarks.training_speed import Lists, Plain, _ListConv


@pytest.mark.parametrize("group", ["p4", "p4m"])
@pytest.mark.parametrize("kind", [gconv.LiftingConv2d, gconv.GConv2d], ids=["lifting", "full"])
def test_a_layer_that_expands_through_lists_is_the_layer(kind, group):
    layer = kind(2, 3, 3, group=group, dtype=torch.float64)
    x = torch.randn(2, 2, layer.filter_shape.order, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(_ListConv(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_the_networks_take_what_p4cnn_takes():
    like = gconv.create_model("p4cnn")
    x = torch.rand(3, 1, 28, 28)
    assert Lists()(x).shape == Plain()(x).shape == Plain(channels_last=True)(x).shape == like(x).shape
    assert sum(p.numel() for p in Lists().parameters()) == sum(p.numel() for p in like.parameters())
