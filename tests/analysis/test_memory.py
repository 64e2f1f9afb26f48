"""The peak of live tensors in a forward pass, against bytes counted by hand."""

import pytest
import torch
from torch import nn

import gconv
from analysis.memory import forward_memory

IMAGE = torch.rand(1, 4, 8, 8)
MAP = IMAGE.numel() * 4  # bytes


class Keeps(nn.Module):
    """Holds every map until the end."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        kept = [x + n for n in range(self.count)]
        return kept[-1]


class Views(nn.Module):
    def forward(self, x):
        return x.view(1, -1)[:, ::2].unflatten(1, (4, 32)).mT


class InPlace(nn.Module):
    def forward(self, x):
        y = x + 1
        return y.mul_(2).relu_()


class Slices(nn.Module):
    """A view keeps the whole storage alive after the map itself is gone."""

    def forward(self, x):
        first = (x + 1)[:, :1]
        return first + (x + 2)[:, :1]


@pytest.mark.parametrize(
    ("model", "maps"),
    [
        (nn.Identity(), 0),
        (Views(), 0),
        (Keeps(1), 1),
        (Keeps(5), 5),
        (nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Tanh()), 2),  # an input and an output at a time
        (InPlace(), 1),
        (Slices(), 2.25),
    ],
    ids=str,
)
def test_the_peak_is_what_is_alive_at_once(model, maps):
    assert forward_memory(model, IMAGE) == maps * MAP


def test_a_chain_of_layers_holds_the_two_largest_neighbours():
    chain = nn.Sequential(
        nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 2, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False)
    )
    assert forward_memory(chain, IMAGE) == (6 + 2) * 64 * 4
    assert forward_memory(chain.double(), IMAGE.double()) == (6 + 2) * 64 * 8


def test_it_grows_with_the_batch_and_counts_neither_weights_nor_input():
    one = forward_memory(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), IMAGE)
    five = forward_memory(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), IMAGE.expand(5, -1, -1, -1).contiguous())
    assert five == 5 * one == 5 * 2 * 4 * 36 * 4


def test_a_factorised_g_layer_needs_the_larger_map_that_is_told_of_it():
    """Its map of O channels for each input is why such layers run dense by default."""
    torch.manual_seed(0)
    layer = gconv.SeparableGConv2d(3, 8, 3, padding=1, group="p4", form="g", rank=1)
    x = torch.rand(1, 3, 4, 16, 16)
    layer.execution = "factorized"
    factorised = forward_memory(layer.eval(), x)
    layer.execution = "dense"
    assert factorised > 2 * forward_memory(layer, x)


def test_nothing_of_it_is_left_behind():
    layer = nn.Conv2d(4, 4, 3)
    forward_memory(layer, IMAGE)
    out = layer(IMAGE)
    assert out.requires_grad
    assert layer.training
