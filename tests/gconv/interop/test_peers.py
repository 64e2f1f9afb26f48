"""The same numbers as GrouPy and escnn: filters, outputs, gradients, and a whole network (see ../data/peers)."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gconv
from gconv import GConv2d, GroupBatchNorm2d, GroupMaxPool, LiftingConv2d, P4ConvP4, P4ConvZ2, SpatialMaxPool2d, group
from gconv.functional.expansion import expand

DATA = Path(__file__).resolve().parents[2] / "data" / "peers"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def arrays(name):
    with np.load(DATA / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def vectors(name):
    """The arrays of a file by vector: ``{"P4ConvZ2_i1_…": {"x": …, "weight": …}, …}``."""
    grouped = defaultdict(dict)
    for key, array in arrays(name).items():
        vector, _, part = key.partition("/")
        grouped[vector][part] = array
    return grouped


GROUPY, ESCNN = vectors("groupy"), vectors("escnn")
TABLES = GROUPY.pop("group_tables")


def settings(name):
    """``(in, out, kernel, stride, padding, bias)`` as spelt in a vector's name."""
    *numbers, bias = re.search(r"_i(\d+)_o(\d+)_k(\d+)_s(\d+)_p(\d+)_(n?b)_", name).groups()
    return *map(int, numbers), bias == "b"


def load(layer, vector):
    layer.load_state_dict({name: vector[name] for name in ("weight", "bias") if name in vector})
    return layer


def relative_error(value, expected):
    assert value.shape == expected.shape
    return ((value - expected).norm() / expected.norm()).item()


def test_all_vectors_are_here_and_most_hold_gradients():
    assert (len(GROUPY), len(ESCNN)) == (28, 7)
    assert sum("gy" in vector for vector in GROUPY.values()) == 21
    assert {name.partition("_")[0] for name, vector in GROUPY.items() if "gy" in vector} == {
        "P4ConvZ2", "P4ConvP4", "P4MConvZ2", "P4MConvP4M",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), [("p4", "_c4"), ("p4m", "")])
def test_group_tables_are_groupys(name, suffix):
    of = group(name)
    np.testing.assert_array_equal(of.product, TABLES[f"mul{suffix}"])
    np.testing.assert_array_equal(of.inverse, TABLES[f"inv{suffix}"])


@pytest.mark.parametrize("name", GROUPY)
def test_layers_are_groupys_forwards_and_backwards(name):
    vector = GROUPY[name]
    layer = load(getattr(gconv, name.partition("_")[0])(*settings(name)).to(vector["x"].dtype), vector)
    tolerance = TOLERANCE[vector["x"].dtype]
    x = vector["x"].requires_grad_()
    y = layer(x)
    assert expand(layer.weight, layer.tables.expansion).equal(vector["expanded"])
    assert relative_error(y[:1], vector["y"]) <= tolerance
    if "gy" in vector:
        y.backward(vector["gy"])
        assert relative_error(x.grad[:1], vector["gx"]) <= tolerance
        for parameter, value in layer.named_parameters():
            assert relative_error(value.grad, vector[f"g{parameter}"]) <= tolerance


@pytest.mark.parametrize("name", ESCNN)
def test_layers_are_escnns(name):
    vector = ESCNN[name]
    kind = LiftingConv2d if "_triv_" in name else GConv2d
    layer = load(kind(*settings(name)[:5], bias="bias" in vector, group={"C": "p4", "D": "p4m"}[name[0]]), vector)
    assert relative_error(layer(vector["x"]), vector["y"]) <= TOLERANCE[torch.float32]


class GroupyNet(nn.Module):
    """The P4CNN that the checkpoint was saved from: no batch norm after the last convolution, no linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = P4ConvZ2(1, 10, 3), GroupBatchNorm2d(10)
        for i in range(2, 7):
            self.add_module(f"conv{i}", P4ConvP4(10, 10, 3))
            self.add_module(f"bn{i}", GroupBatchNorm2d(10))
        self.top = P4ConvP4(10, 10, 4)
        self.pool, self.group_pool = SpatialMaxPool2d(2), GroupMaxPool()

    def taps(self, x):
        """What leaves each block, and the class scores."""
        for i in range(1, 7):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            yield f"tap_block{i}", x
            x = self.pool(x) if i == 2 else x
        x = self.top(x)
        yield "tap_top", x
        yield "y", self.group_pool(x).flatten(1)


def test_a_groupy_checkpoint_loads_as_it_is_and_gives_groupys_activations():
    net, given = GroupyNet().eval(), arrays("groupy_p4cnn_io")
    net.load_state_dict(arrays("groupy_p4cnn_state_dict"))
    with torch.no_grad():
        for name, value in net.taps(given["x"]):
            cut = value if name == "y" else value[:1, ..., :8, :8]
            assert relative_error(cut, given[name]) <= 1e-5
        *_, (_, scores) = net.double().taps(given["x"].double())
    assert relative_error(scores, given["y_float64"]) <= 1e-12
