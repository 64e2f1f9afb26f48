"""A module is replaced wherever a network has it, and nothing else is."""

import pytest
from torch import nn

from gconv.nn.replace import replace_module


def network():
    """One layer under three names: directly, in a block, and in the same block under another name."""
    layer = nn.Linear(2, 2)
    net = nn.Module()
    net.first, net.other = layer, nn.Linear(2, 2)
    net.block = nn.Sequential(nn.ReLU(), layer)
    net.again = net.block
    return net


@pytest.mark.parametrize("name", ["first", "block.1", "again.1"])
def test_a_module_is_replaced_under_every_name(name):
    net, new = network(), nn.Identity()
    other, relu = net.other, net.block[0]
    replace_module(net, net.get_submodule(name), new)
    assert net.first is net.block[1] is net.again[1] is new
    assert (net.other, net.block[0]) == (other, relu)
    assert net.block is net.again
    assert len([module for module in net.modules() if isinstance(module, nn.Linear)]) == 1
